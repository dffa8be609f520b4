"""Run the hub and its LoRA experts as one batch.

Such experts share all weights of the hub but their LoRAs. So the hub's loop runs once, over the hub's sequences and,
behind them, the experts' copies of them: every product with the hub's weights is one for all models, and each LoRA is
added to the rows of its own expert. Decoding time goes mostly into reading weights, and this way they are read only
once.

Shapes: B sequences, T tokens, D the width; with N experts a batch of all is ((1 + N) * B, T, D), the hub's rows first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..forward.composition import Composition
from ..forward.decoder import Decoder, text_config, token_embeddings
from ..forward.executor import Boundary, Executor, InOneProcess, SequentialExecutor
from ..forward.expert import Expert
from ..forward.hooks import ForwardRunner
from ..forward.recorder import with_layers
from ..forward.state import ForwardState, Lane, run_in_turn
from ..forward.stream import Checkpoint
from .joint_model import JointCacheLayer, JointModel, NotJoint, unstitched, why_not


logger = logging.getLogger(__name__)

_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_NOT_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")


class JointExecutor(InOneProcess):
    """Runs the hub and its LoRA experts as one batch, and other experts by an executor of their own.

    Args:
        state: The forward's.
        model: Hub and LoRA experts.
        lanes: What runs with the hub, by key.
        others: Runs the rest.

    Attributes:
        rows: The rows of the batch of all that belong to each lane, by key.
        loras: The same, each with the name of its expert.
        number_of_rows: How many the batch of all has.
    """

    def __init__(
        self, state: ForwardState, model: JointModel, lanes: Mapping[Hashable, Lane], others: Executor
    ) -> None:
        self._state, self._model, self._others = state, model, others
        self._states: Optional[dict[Hashable, Tensor]] = None
        self._together: Optional[Tensor] = None  # the states of all as a layer returned them, until one is replaced
        self._hub_BTD: Optional[Tensor] = None  # the hub's among them
        self._for_all: list[tuple[Tensor, Tensor]] = []  # what layers were called with: the hub's, and for all
        tokens = state.call["inputs_embeds"] if state.call.get("input_ids") is None else state.call["input_ids"]
        self._batch = end = len(tokens)
        self.rows: dict[Hashable, slice] = {}
        for key, lane in lanes.items():
            start, end = end, end + (self._batch if lane.rows is None else len(lane.rows))
            self.rows[key] = slice(start, end)
        self.loras = [(lane.name, self.rows[key]) for key, lane in lanes.items()]
        self.number_of_rows = end
        every = all(lane.rows is None for lane in lanes.values())
        self._sequences = None if every else self._of_hub(lanes)
        self._cache = self._joint_cache(lanes)

    def _of_hub(self, lanes: Mapping[Hashable, Lane]) -> Tensor:
        """The hub's row with the sequence of every row of the batch of all."""
        hub = torch.arange(self._batch)
        return torch.cat([hub, *(hub if lane.rows is None else lane.rows.cpu() for lane in lanes.values())])

    def _joint_cache(self, lanes: Mapping[Hashable, Lane]) -> Optional[Cache]:
        if self._state.cache is None:
            return None
        own = [lane.cache.layers for lane in lanes.values() if lane.cache is not None]
        sizes = [self._batch, *(rows.stop - rows.start for rows in self.rows.values())]
        hub = self._state.cache.layers[: self._state.composition.hub_layers]
        layers = [JointCacheLayer(parts, sizes) for parts in zip(hub, *own)]
        return Cache(layers=layers)  # type: ignore[arg-type]  # need not be subclasses of transformers'

    def run_hub(self, hub: Callable[[], Any]) -> Any:
        """Run the hub's loop over the batch of all, in place of `hub`."""
        return self._model.backbone(**self._state.call)

    def join(self, hub_BTD: Tensor) -> Tensor:
        """The hidden states of all: what a layer is to be called with."""
        if self._states is None:  # embedded by now, which is the same for all
            return self._of_every_row(hub_BTD)
        if self._together is not None and hub_BTD is self._hub_BTD:
            return self._together
        return torch.cat([hub_BTD, *self._states.values()])

    def part(self, hidden: Tensor) -> Tensor:
        """Keep the experts' hidden states, and return the hub's."""
        self._states = {key: hidden[rows] for key, rows in self.rows.items()}
        self._together, self._hub_BTD = hidden, hidden[: self._batch]
        return self._hub_BTD

    def for_all(self, value: Any) -> Any:
        """Return what a layer of the hub is called with, for the batch of all."""
        if isinstance(value, Cache):
            return self._cache
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.for_all, value))
        if isinstance(value, dict):
            return {name: self.for_all(each) for name, each in value.items()}
        if not isinstance(value, Tensor) or value.dim() < 2 or (len(value) == 1 and self._batch > 1):
            return value
        if len(value) == self._batch:
            # Every layer is called with the same masks and rotary positions.
            for known, of_every_row in self._for_all:
                if known is value:
                    return of_every_row
            self._for_all.append((value, self._of_every_row(value)))
            return self._for_all[-1][1]
        raise NotJoint(f"their layers take a tensor of shape {tuple(value.shape)} beside hidden states")

    def _of_every_row(self, value: Tensor) -> Tensor:
        if self._sequences is None:
            return value.repeat(1 + len(self.rows), *[1] * (value.dim() - 1))
        return value.index_select(0, self._sequences.to(value.device))

    def look_ahead(self, boundary: Boundary) -> None:
        self._others.look_ahead(boundary)

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        assert self._states is not None  # the hub's layers bring the experts along
        return {**self._others.advance(boundary, checkpoint), **self._states}

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        assert self._states is not None
        self._together, self._states = None, {key: states[key] for key in self.rows}
        self._others.replace_states({key: state for key, state in states.items() if key not in self._states})

    def close(self) -> None:
        self._others.close()


class JointLora:
    """Makes the executors of a model's forwards (a `MakeExecutor`): LoRA experts with the hub, others in turn.

    Args:
        decoder: The hub's.
        runner: Runs the hub's forwards.
    """

    def __init__(self, decoder: Decoder, runner: ForwardRunner) -> None:
        self._decoder, self._runner = decoder, runner
        self._models: dict[str, JointModel] = {}  # by adapter
        self._reasons: dict[str, dict[str, str]] = {}  # why an expert runs by itself, by adapter and name

    def prepare(self, adapter: str, experts: Mapping[str, Expert]) -> None:
        """Find out which experts of an adapter can run with the hub, and get ready for that."""
        self.forget(adapter)
        reasons = {name: why_not(self._decoder, expert) for name, expert in sorted(experts.items())}
        fit = {name: experts[name] for name, reason in reasons.items() if reason is None}
        if fit:
            try:
                model = JointModel(self._decoder, fit, self._runner)
                self._check_results(model)
                self._models[adapter] = model
            except NotJoint as error:
                reasons |= dict.fromkeys(fit, str(error))
        self._reasons[adapter] = {name: reason for name, reason in reasons.items() if reason is not None}
        logger.info("Adapter %r: %s", adapter, self.describe(adapter))

    def forget(self, adapter: str) -> None:
        """Drop what was prepared for an adapter."""
        self._models.pop(adapter, None)
        self._reasons.pop(adapter, None)

    def names(self, adapter: str) -> list[str]:
        """The experts of an adapter that run with the hub as one batch in inference."""
        model = self._models.get(adapter)
        return [] if model is None else sorted(model.experts)

    def describe(self, adapter: str) -> str:
        """Which experts of an adapter run with the hub as one batch in inference, and why others run by themselves."""
        lines = [f"{name}: one batch with the hub" for name in self.names(adapter)]
        lines += [f"{name}: by itself ({reason})" for name, reason in self._reasons.get(adapter, {}).items()]
        return "\n".join(lines) or "no experts"

    def __call__(self, state: ForwardState) -> Executor:
        model = self._models.get(state.composition.adapter)
        if model is not None and self._applies(state, model):
            active = state.composition.experts
            names = [name for name, expert in model.experts.items() if active.get(name) is expert]
            lanes = state.lanes(names)
            if lanes:
                return _joint_executor(model, lanes, state)
        return SequentialExecutor(state.begin_streams())

    @torch.no_grad()
    def _check_results(self, model: JointModel) -> None:
        """Compare with every model alone, over two sequences of four tokens; of fake tensors only the shapes.

        Raises:
            NotJoint: If something differs by more than rounding, or a layer cannot be called so.
        """
        backbone, layers = self._decoder.backbone, self._decoder.layers
        config = text_config(backbone)
        device = token_embeddings(backbone).weight.device
        call = {"input_ids": torch.arange(1, 9, device=device).view(2, 4) % config.vocab_size, "use_cache": False}
        composition = Composition({}, len(layers), config, model.experts, False)
        model_lanes: dict[Hashable, Lane] = {name: Lane(name, None, None) for name in model.experts}
        alone = with_layers(backbone, self._decoder.list_name, [unstitched(layer) for layer in layers])
        states = []
        for make in (run_in_turn, partial(_joint_executor, model, model_lanes)):
            state = ForwardState(composition, call, None, make)
            state.start()
            try:
                hub = self._runner.inside(state, partial(state.executor.run_hub, partial(alone, **call)))[0]
            except Exception as error:  # whatever: the models run by themselves then
                raise NotJoint(f"a batch of all fails: {error}") from error
            states.append({"hub": hub, **state.final_states().by_name})
        for name, expected in states[0].items():
            if isinstance(expected, FakeTensor):
                continue
            distance = (states[1][name] - expected).double().norm() / expected.double().norm()
            eps = torch.finfo(expected.dtype).eps
            if not distance <= (64 if eps < 1e-5 else 8) * eps:  # half precision: a LoRA's part is larger than that
                raise NotJoint(f"a batch of all gives other results for {name!r}")

    def _applies(self, state: ForwardState, model: JointModel) -> bool:
        """Whether this forward can run so: in inference, with a cache of keys and values, if nothing else is asked."""
        call, backbone = state.call, self._decoder.backbone
        if torch.is_grad_enabled() or backbone.training:
            return False
        if any(call.get(name) for name in _NOT_COLLECTED) or any(
            getattr(backbone.config, name, False) for name in _NOT_COLLECTED
        ):
            return False
        if getattr(state.cache, "offloading", False):
            return False
        if state.cache is not None and not all(
            type(layer) in _CACHE_LAYERS for layer in state.cache.layers[: state.composition.hub_layers]
        ):
            return False
        if torch.compiler.is_compiling():
            return True
        modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        return not modes and model.is_whole()


def _joint_executor(model: JointModel, lanes: Mapping[Hashable, Lane], state: ForwardState) -> JointExecutor:
    return JointExecutor(state, model, lanes, SequentialExecutor(state.begin_streams(without=lanes)))
