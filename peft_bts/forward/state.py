"""One forward of a stitched model: the hub's call, the experts' streams, and what happens at a stitch.

The hub runs its own loop over its own layers; it must not know that it has company. What the stitches need to
know of the forward under way, they find in a `Run`, which lives from the hub's backbone being called until it
returns. Threads have their own, and a forward inside a forward has its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import Cache

from ..config import EXPERTS_INTO_HUB, expert_boundary
from ..inference.stacking import Stack
from ..inference.threads import Ahead, may_run_otherwise
from .cache import check_cache, find_cache, join_caches
from .expert import Expert, Stream, cached_tokens
from .masks import check_mask
from .thread_local import PerThread, Turnstile


@dataclass
class Plan:
    """What one adapter runs: its stitches' kinds by hub layer, and its experts by name."""

    schedule: dict[int, str]
    hub_layers: int
    hub_config: Any  # the hub's text config
    experts: dict[str, Expert]
    projected: bool  # expert_streams="projected"
    adapter: str = ""


class Run:
    """The state of one forward.

    Args:
        plan: What the active adapter runs; `None` while no adapter is active or all are disabled.
        call: The arguments of the hub's backbone, by name.
        outer: The run that this one interrupts: that of a forward in whose middle this forward was called.
        observers: Told of the run, with its gates, when the last stitch is done (gates.py).
        ahead: Where experts run while the hub does; `None` if all run in this thread.
        stacks: Experts that run as one.

    Attributes:
        gates: While there are observers, by hub layer and model: a token's gate, the mean over its channels, (B, T).
        past: While there are observers, the tokens that the cache held before; `None` where it does not tell.
        cache: The hub's cache, or `None`.
    """

    def __init__(
        self,
        plan: Optional[Plan],
        call: dict[str, Any],
        outer: Optional[Run],
        observers: tuple = (),
        ahead: Optional[Ahead] = None,
        stacks: Sequence[Stack] = (),
    ) -> None:
        self.plan, self.call, self.outer, self.observers = plan, call, outer, observers
        self.ahead, self.stacks = ahead, stacks
        self.streams: Optional[dict[Any, Stream]] = None  # by expert
        if observers:
            self.gates: dict[int, dict[str, Tensor]] = {}
            self.cache: Optional[Cache] = call.get("past_key_values")
            self.past = cached_tokens(self.cache)

    @torch.compiler.disable
    def _note_gates(self, layer: int, gates: dict[str, Tensor]) -> None:
        for name, gate in gates.items():
            # Channels are not kept: a trace of them would be as large as all hidden states.
            dtype = torch.promote_types(gate.dtype, torch.float32)
            self.gates.setdefault(layer, {})[name] = gate.detach().mean(dim=-1, dtype=dtype)

    @torch.compiler.disable
    def _tell_observers(self) -> None:
        for observer in self.observers:
            observer.record(self)

    def check(self) -> None:
        """Raise `ValueError` for inputs that the experts cannot take, before anything is computed."""
        check_call(self.plan, self.call)

    def _open(self, cache: Optional[Cache]) -> None:
        self.streams = self._start(cache)
        if self.observers:
            self.cache = cache

    def _start(self, cache: Optional[Cache]) -> dict[Any, Stream]:
        """Begin the forwards of all experts that take part."""
        experts = self.plan.experts
        caches = {} if cache is None else join_caches(cache, self.plan.hub_layers, experts)
        streams = {name: experts[name](self.call, caches.get(name), self.plan.hub_config) for name in sorted(experts)}
        for stack in self.stacks:
            streams = stack.join(streams, experts, caches)
        return streams

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """If experts run ahead, start them. Arguments: those of the hub's first layer."""
        if self.ahead is not None:
            self._open(find_cache(args, kwargs))
            self._run_ahead(-1)

    def _run_ahead(self, layer: int) -> None:
        """Send the experts to the next stitch behind a hub layer."""
        following = min((index for index in self.plan.schedule if index > layer), default=None)
        if following is not None:
            # Streams of one model take turns: layers that are offloaded, or repacked, change while they run.
            by_model: dict[int, list[Callable]] = {}
            for stream in self.streams.values():
                advance = partial(stream.advance, self._boundary(following, stream))
                by_model.setdefault(id(stream.layers), []).append(advance)
            for works in by_model.values():
                self.ahead.begin(partial(_in_turn, works))

    def _boundary(self, layer: int, stream: Stream) -> int:
        return expert_boundary(layer + 1, self.plan.hub_layers, stream.num_layers)

    def cross(self, layer: int, stitch: nn.Module, hub_BTD: Tensor, args: tuple, kwargs: dict, checkpoint) -> Tensor:
        """Bring every expert up to the stitch behind a hub layer, apply it, and return the hub's new state.

        Args:
            layer: 0-based hub layer that has just run.
            stitch: `ExpertsIntoHub` or `HubIntoExperts`.
            hub_BTD: The hub layer's hidden states.
            args, kwargs: What the hub layer was called with; the cache is among them.
            checkpoint: The hub's gradient checkpointing function while it is in use, else `None`.
        """
        if self.streams is None:
            # transformers drops the cache while it checkpoints gradients: the recomputation would fill it twice.
            cache = find_cache(args, kwargs) if checkpoint is None else None
            self._open(cache)
        if self.ahead is not None:
            self.ahead.finish()
        states = {
            key: stream.advance(self._boundary(layer, stream), checkpoint) for key, stream in self.streams.items()
        }
        changes_experts = stitch.kind != EXPERTS_INTO_HUB or self.plan.projected
        if self.ahead is not None and not changes_experts:
            self._run_ahead(layer)
        hub_BTD, new_states = self._apply(layer, stitch, hub_BTD, states)
        if changes_experts:
            for key, stream in self.streams.items():
                stream.state = new_states[key].to(stream.state.device)
            if self.ahead is not None:
                self._run_ahead(layer)
        if layer == self.plan.hub_layers - 1:
            self._end()
        return hub_BTD

    def _apply(
        self, layer: int, stitch: nn.Module, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Apply the stitch behind a hub layer: the hub's and the experts' new states."""
        states = {name: state.to(hub_BTD.device) for name, state in states.items()}
        observe = partial(self._note_gates, layer) if self.observers else None
        if stitch.kind == EXPERTS_INTO_HUB:
            return stitch(hub_BTD, states, observe)
        return hub_BTD, stitch(hub_BTD, states, observe)

    def _end(self) -> None:
        """The last stitch is done."""
        if self.observers:
            self._tell_observers()


class Runs:
    """Opens a `Run` when the hub's backbone is called and closes it when the backbone returns.

    Args:
        backbone: The module that loops over the hub's decoder layers.
        first_layer: The first of them.
        active_plan: Says what a forward that starts now runs; `None` for the hub alone.
        new_run: Makes the `Run`.

    Attributes:
        observers: Told of every run's gates (gates.py); mostly none.
        pool: Threads for the experts (parallel.py), or `None`.
        stacks: Experts that run as one (stacking.py).
        in_parallel: Held while there are such threads or stacks.
    """

    observers: tuple = ()
    pool: Optional[ThreadPoolExecutor] = None
    stacks: Sequence[Stack] = ()

    def __init__(
        self,
        backbone: nn.Module,
        first_layer: nn.Module,
        active_plan: Callable[[], Optional[Plan]],
        new_run: Callable[..., Run],
    ) -> None:
        self._backbone, self._first_layer, self._active_plan = backbone, first_layer, active_plan
        self._new_run = new_run
        self._argument_names = list(inspect.signature(backbone.forward).parameters)
        self._slot = PerThread()
        self._hooks: list[Any] = []
        self.in_parallel = Turnstile()

    def current(self) -> Optional[Run]:
        """The run of the forward under way in this thread."""
        run = self._slot.get()
        if run is not None and run.outer is not None and not torch.compiler.is_compiling():
            run = self._without_dead_runs(run)  # a hook may have swallowed the KeyboardInterrupt of an inner forward
        return run

    def watch(self) -> None:
        """Hook into the backbone; nothing happens if that is done already."""
        if not self._hooks:
            self._hooks = [
                self._backbone.register_forward_pre_hook(self._open, with_kwargs=True),
                self._backbone.register_forward_hook(self._close, always_call=True),
                self._first_layer.register_forward_pre_hook(self._before_first_layer, with_kwargs=True),
            ]

    def unwatch(self) -> None:
        """Remove every trace from the backbone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _open(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        plan = self._active_plan()
        call = {**dict(zip(self._argument_names, args)), **kwargs}
        outer = self._slot.get()
        if outer is not None and not torch.compiler.is_compiling():
            outer = self._without_dead_runs(outer, opening=True)
        # Before the checks: `_close` is called even if they raise.
        otherwise = (self.pool is not None or self.stacks) and plan is not None and may_run_otherwise()
        ahead = Ahead(self.pool) if otherwise and self.pool is not None else None
        run = self._new_run(plan, call, outer, self.observers, ahead, self.stacks if otherwise else ())
        self._slot.set(run)
        if plan is not None:
            run.check()

    def _close(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        run = self._slot.get()
        if run is not None and run.ahead is not None:
            run.ahead.abandon()  # nothing is left, unless there was an error
        self._slot.set(None if run is None else run.outer)

    def _before_first_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Optional[tuple]:
        run = self.current()
        if run is None or run.plan is None:
            return None
        run.begin(args, kwargs)
        return self._cut(run, layer, args, kwargs)

    def _cut(self, run: Run, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Optional[tuple]:
        """Take the gradient off the hub's embeddings where nobody reads it.

        With gradient checkpointing, transformers and TRL have the embeddings require gradients, lest reentrant
        checkpoints cut off the weights behind them. Here gradients begin at the first stitch that leads into the hub,
        and every layer before it would be recomputed and differentiated for nothing.
        """
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or not hidden.requires_grad:
            return None
        if getattr(checkpoint_function(layer), "keywords", {}).get("use_reentrant", True):
            return None
        embeds = run.call.get("inputs_embeds")
        trained = any(p.requires_grad for n, p in self._backbone.named_parameters() if ".stitch_layer." not in n)
        if trained or (embeds is not None and embeds.requires_grad):
            return None
        if args:
            return (hidden.detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.detach()}

    def _without_dead_runs(self, run: Run, opening: bool = False) -> Optional[Run]:
        """Drop runs whose forward is over: a KeyboardInterrupt skips even hooks that are always called.

        A run is alive while its backbone's call is on this thread's stack; runs nest, so counting those calls tells.
        `opening`: one of them is only about to get its run.
        """
        alive, frame, call = -opening, sys._getframe(), nn.Module._call_impl.__code__
        while frame is not None:
            if frame.f_code is call and frame.f_locals.get("self") is self._backbone:
                alive += 1
            frame = frame.f_back
        runs = []
        while run is not None:
            runs.append(run)
            run = run.outer
        return runs[-alive] if alive > 0 else None


def _in_turn(works: list[Callable]) -> None:
    for work in works:
        work()


def check_call(plan: Plan, call: dict[str, Any]) -> None:
    """See `Run.check`."""
    if not plan.experts:
        raise ValueError(
            "No expert is attached, so there is nothing to stitch. Call `model.attach_expert(name, model)`, or name "
            "the experts in StitchConfig(experts=...)."
        )
    embeds = call.get("inputs_embeds")
    for name, expert in plan.experts.items():
        check_mask(call.get("attention_mask"), plan.hub_config, expert.config, name)
        if embeds is not None and call.get("input_ids") is None:
            width = expert.model.get_input_embeddings().weight.shape[1]
            if width != embeds.shape[-1]:
                raise ValueError(
                    f"inputs_embeds has width {embeds.shape[-1]}, but expert {name!r} embeds tokens in {width} "
                    "channels. Pass `input_ids`, so that every model can embed them itself."
                )
    cache = call.get("past_key_values")
    if isinstance(cache, Cache):
        check_cache(cache, plan.experts)
        join_caches(cache, plan.hub_layers, plan.experts)  # now: some caches cannot be made for some experts
        if getattr(cache, "offloading", False):
            # Its last layer brings back the one behind, which is an expert's now, instead of its first.
            cache.prefetch(0, cache.only_non_sliding)


def checkpoint_function(layer: nn.Module) -> Optional[Callable]:
    """The function under which transformers recomputes this hub layer in the backward pass, if it does so now."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func
    return None
