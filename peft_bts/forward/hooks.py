"""`HubForward`: where a stitched forward starts and ends.

It stands in for the `forward` of the hub's backbone, the module that loops over the decoder layers: whoever calls the
hub, its head or a loss function that skips the head, comes by here.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

from torch import Tensor, nn
from transformers import Cache, DynamicCache

from .composition import Composition
from .observers import Observation, Observer
from .state import FinalStates, ForwardState, MakeExecutor, run_in_turn
from .stream import Checkpoint
from .thread_local import ThreadLocal, Transient


# Takes what `ForwardState` takes.
MakeState = Callable[[Composition, dict[str, Any], Optional[Cache], MakeExecutor, Optional[Observation]], ForwardState]


class Body(NamedTuple):
    """The models' work as it is when their heads' turn comes.

    Attributes:
        state: The forward's state.
        hub_BTD: What the hub's head reads.
        experts: The experts' hidden states behind their last layers.
    """

    state: ForwardState
    hub_BTD: Tensor
    experts: FinalStates


class ForwardSettings(Transient):
    """Settings of a model's forwards: how they run, and who is told. Copies of the model start with the defaults.

    Attributes:
        observers: Told of every forward's gates; mostly none.
        make_executor: Makes what runs the experts' streams; `None`: as ever.
        lock: Held while that is set.
    """

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self.make_executor: Optional[MakeExecutor] = None
        self.lock = threading.Lock()


class ForwardRunner:
    """Runs forwards of a hub with a `ForwardState` each. Threads have their own, and so has a forward inside another.

    Args:
        make_state: Makes the state of a forward.

    Attributes:
        make_executor: Makes what runs the experts' streams, unless the settings say otherwise.
    """

    def __init__(self, make_state: MakeState = ForwardState) -> None:
        self._make_state = make_state
        self.make_executor: MakeExecutor = run_in_turn
        self._current: ThreadLocal[ForwardState] = ThreadLocal()
        # Where the mixture's head waits for what the models have done.
        self._awaited: ThreadLocal[list[Body]] = ThreadLocal()
        self.settings = ForwardSettings()

    def current(self) -> Optional[ForwardState]:
        """The state of the forward under way in this thread; `None` if the hub runs alone, or not at all."""
        return self._current.get()

    def run(
        self,
        composition: Optional[Composition],
        call: dict[str, Any],
        cache: Optional[Cache],
        hub: Callable[[], Any],
    ) -> Any:
        """Return what the hub returns, with the experts beside it.

        Args:
            composition: What takes part; `None` for the hub alone.
            call: The arguments of the hub's backbone, by name.
            cache: The hub's cache; `None` if the forward runs without one.
            hub: Runs the hub's backbone.

        Raises:
            ValueError: For inputs that the experts cannot take, and for a mixture if nobody awaits what the models do
                (`await_body`); nothing has been computed then.
        """
        if composition is None:
            return self.inside(None, hub)
        bodies = self._awaited.get() if composition.mixture else None
        if composition.mixture and bodies is None:
            raise ValueError(
                "The hub's backbone was called without its head, as losses and servers do that compute the head's "
                "product themselves; they would get the hub's own distribution, not the mixture "
                "(output='mixture', the default). Call the whole model: it returns the mixture's logits, its loss, "
                "and hidden states if asked for; or use an adapter that was made with StitchConfig(output='hub')."
            )
        observers = self.settings.observers
        observation = Observation(composition, call, cache, observers) if observers else None
        make_executor = self.settings.make_executor or self.make_executor
        state = self._make_state(composition, call, cache, make_executor, observation)
        state.check()
        try:
            return self.inside(state, functools.partial(self._run, state, hub, bodies))
        finally:
            state.close()

    def inside(self, state: Optional[ForwardState], function: Callable[[], Any]) -> Any:
        """Call a function while `state` is that of the forward under way."""
        outer = self._current.get()
        self._current.set(state)
        try:
            return function()
        finally:
            self._current.set(outer)

    def _run(self, state: ForwardState, hub: Callable[[], Any], bodies: Optional[list[Body]]) -> Any:
        state.start()
        out = state.executor.run_hub(hub)
        if bodies is not None:
            bodies.append(Body(state, out[0], state.final_states()))
        return out

    def await_body(self, call: Callable[[], Any]) -> tuple[Any, Body]:
        """Return what `call`, a call of the hub's causal LM, returns, and what its backbone and the experts did."""
        outer = self._awaited.get()
        bodies: list[Body] = []
        self._awaited.set(bodies)
        try:
            out = call()
        finally:
            self._awaited.set(outer)
        return out, bodies[-1]


class InstanceForward:
    """Takes the place of one module's `forward`.

    Args:
        module: The module.

    Attributes:
        wrapped: What the module had as a `forward` of its own, because a library such as accelerate had wrapped it.
    """

    wrapped: Optional[Callable[..., Any]] = None

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        parameters = inspect.signature(module.forward).parameters.values()
        # What others find who ask for the signature of `module.forward`. Annotations could not all be pickled.
        self.__signature__ = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        self.installed = False

    def install(self) -> None:
        """Take the place; nothing happens if that is done already."""
        if not self.installed:
            self.wrapped = vars(self._module).get("forward")
            self._module.forward = self
            self.installed = True

    def remove(self) -> None:
        """Leave the module as it was. If a library has wrapped its `forward` meanwhile, calls pass through here."""
        if self.installed and vars(self._module).get("forward") is self:
            del self._module.forward
            if self.wrapped is not None:
                self._module.forward = self.wrapped
        self.installed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes now; as before, unless a subclass says otherwise."""
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            return self.wrapped(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.__signature__.parameters, args)), **kwargs}


def _nothing(composition: Optional[Composition]) -> AbstractContextManager[Any]:
    """Without what is given: dynamo cannot break its graph inside of a `nullcontext` that holds an object."""
    return nullcontext()


class HubForward(InstanceForward, ForwardRunner):
    """Stands in for the `forward` of a hub's backbone.

    Args:
        backbone: The module that loops over the hub's decoder layers.
        first_layer: The first of them.
        active_composition: Says what a forward that starts now runs; `None` for the hub alone.
        make_state: Makes the state of a forward.

    Attributes:
        around: Makes a context for every forward, from what it runs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        first_layer: nn.Module,
        active_composition: Callable[[], Optional[Composition]],
        make_state: MakeState,
    ) -> None:
        InstanceForward.__init__(self, backbone)
        ForwardRunner.__init__(self, make_state)
        self._backbone, self._first_layer, self._active_composition = backbone, first_layer, active_composition
        self._hook: Any = None
        self.around: Callable[[Optional[Composition]], AbstractContextManager[Any]] = _nothing

    def install(self) -> None:
        super().install()
        if self._hook is None:
            self._hook = self._first_layer.register_forward_pre_hook(self._detach_embeddings, with_kwargs=True)

    def remove(self) -> None:
        super().remove()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        composition = self._active_composition()
        with self.around(composition):
            return self._call(composition, *args, **kwargs)

    def _call(self, composition: Optional[Composition], *args: Any, **kwargs: Any) -> Any:
        if composition is None:
            return self.run(None, {}, None, functools.partial(self._forward, *args, **kwargs))
        call = self._by_name(args, kwargs)
        cache = call["past_key_values"] = self._cache(call, composition)
        if checkpoint_function(self._first_layer) is not None:
            cache = None  # transformers drops it while it checkpoints: the recomputation would fill it twice
        return self.run(composition, call, cache, functools.partial(self._forward, **call))

    def _cache(self, call: dict[str, Any], composition: Composition) -> Any:
        """The cache of this call. If the backbone would make one, it is made now: the experts' go with it."""
        given = call.get("past_key_values")
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._backbone.config, "use_cache", False)
        if given is not None or not use_cache or checkpoint_function(self._first_layer) is not None:
            return given
        return DynamicCache(config=composition.hub_config)

    def _detach_embeddings(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Optional[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Take the gradient off the hub's embeddings where nobody reads it.

        With gradient checkpointing, transformers and TRL have the embeddings require gradients, lest reentrant
        checkpoints cut off the weights behind them. Here gradients begin at the first stitch that leads into the hub,
        and every layer before it would be recomputed and differentiated for nothing.
        """
        state = self.current()
        hidden = args[0] if args else kwargs.get("hidden_states")
        if state is None or not isinstance(hidden, Tensor) or not hidden.requires_grad:
            return None
        if getattr(checkpoint_function(layer), "keywords", {}).get("use_reentrant", True):
            return None
        embeds = state.call.get("inputs_embeds")
        trained = any(p.requires_grad for n, p in self._backbone.named_parameters() if ".stitch_layer." not in n)
        if trained or (embeds is not None and embeds.requires_grad):
            return None
        if args:
            return (hidden.detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.detach()}


def checkpoint_function(layer: nn.Module) -> Optional[Checkpoint]:
    """The function under which transformers recomputes this hub layer in the backward pass, if it does so now."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return getattr(layer, "_gradient_checkpointing_func", None)
    return None
