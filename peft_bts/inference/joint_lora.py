"""Run the hub and its LoRA experts as one batch.

Such experts share all weights of the hub but their LoRAs. So the hub's loop runs once, over the hub's sequences and,
behind them, the experts' copies of them: every product with the hub's weights is one for all models, and each LoRA is
added to the rows of its own expert. Decoding time goes mostly into reading weights, and this way they are read only
once.

Shapes: B sequences, T tokens, D the width; with N experts a batch of all is ((1 + N) * B, T, D), the hub's rows first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .._compat.peft import peft_type_name
from ..distributed.absent import AbsentExpert, has_layers
from ..distributed.parallel import ExpertParallel
from ..forward.composition import Composition
from ..forward.decoder import Decoder, text_config, token_embeddings
from ..forward.executor import Boundary, Executor, InOneProcess, SequentialExecutor
from ..forward.expert import Expert
from ..forward.hooks import ForwardRunner
from ..forward.layer import StitchLayer, behind_layer
from ..forward.placement import is_dispatched
from ..forward.recorder import StandIn, with_layers, with_modules
from ..forward.state import ForwardState, Lane, run_in_turn
from ..forward.stream import Checkpoint
from .joint_layers import JointCacheLayer, NotStackable


logger = logging.getLogger(__name__)

_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_COLLECTOR = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs are asked for
_NEVER_CALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)  # containers
_NOT_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")


class JointLinear(nn.Module):
    """A linear layer of the hub over a batch of all: one product for all rows, each LoRA for its expert's rows."""

    base: nn.Module
    loras: Mapping[str, LoraLayer]
    runner: ForwardRunner

    def __init__(self, base: nn.Module, loras: Mapping[str, LoraLayer], runner: ForwardRunner) -> None:
        super().__init__()
        self.__dict__.update(base=base, loras=loras, runner=runner)  # not as submodules: they belong to the models

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        _, executor = _under_way(self.runner)
        # Decoding spends its time on the number of operations, Python's included: hence no more of them than needed.
        in_few = _in_few_operations(x, y)
        if in_few:
            x, flat = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        else:
            flat = y
        each = len(x) // executor.number_of_rows  # 1; or T, where sequences are flattened
        for name, rows in executor.loras:
            lora = self.loras.get(name)
            if lora is None or lora.disable_adapters:
                continue
            start, stop = rows.start * each, rows.stop * each
            downs, ups = lora.lora_A._modules, lora.lora_B._modules
            for adapter in lora.active_adapters:
                if adapter in downs:
                    _add_lora(
                        flat[start:stop], x[start:stop], downs[adapter], ups[adapter], lora.scaling[adapter], in_few
                    )
        return y


def _in_few_operations(x: Tensor, y: Tensor) -> bool:
    """Whether a LoRA may be added in place by one operation: not in half precision, where PEFT rounds in between."""
    exact = x.dtype == y.dtype and x.dtype.itemsize >= 4
    return exact and y.is_contiguous() and not torch.is_autocast_enabled(x.device.type)


def _add_lora(y: Tensor, x: Tensor, down: Any, up: Any, scaling: float, in_few: bool) -> None:
    """Add a LoRA's product of x (rows, ..., in) to y (rows, ..., out), in place."""
    weight = down.weight
    if in_few and weight.dtype == x.dtype and up.bias is None:
        y.addmm_(F.linear(x, weight), up.weight.t(), alpha=scaling)
    else:
        y.copy_(y + up(down(x.to(weight.dtype))) * scaling)


class _JointLayer(StandIn):
    """A decoder layer of the hub over a batch of all, with the stitch behind it."""

    def __init__(self, layers: nn.ModuleList, index: int, joint: nn.Module, runner: ForwardRunner) -> None:
        super().__init__()
        self.__dict__.update(layers=layers, joint=joint, runner=runner)
        self._index = index

    def _original(self) -> nn.Module:
        return _unstitched(self.__dict__["layers"][self._index])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, executor = _under_way(self.__dict__["runner"])
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        args, kwargs = executor.for_all(args), executor.for_all(kwargs)
        out = self.__dict__["joint"](executor.join(hidden), *args, **kwargs)
        hub_BTD = executor.part(out[0] if isinstance(out, tuple) else out)
        out = (hub_BTD, *[None] * (len(out) - 1)) if isinstance(out, tuple) else hub_BTD
        layer = self.__dict__["layers"][self._index]
        stitch = layer.active_stitch() if self._index in state.composition.schedule else None
        if stitch is None:
            return out
        return behind_layer(self.__dict__["runner"], self._index, self._original(), stitch, out)


class JointModel:
    """A hub and those of its experts that are LoRAs of it.

    Args:
        decoder: The hub's.
        experts: LoRA experts of the hub (`why_not` finds nothing against them).
        runner: Runs the hub's forwards.
    """

    def __init__(self, decoder: Decoder, experts: Mapping[str, Expert], runner: ForwardRunner) -> None:
        self.decoder, self.experts = decoder, dict(experts)
        layers = decoder.layers
        hub_layers = [_unstitched(layer) for layer in layers]
        joint = [
            _joint(hub_layer, {name: expert.layers[i] for name, expert in experts.items()}, runner)
            for i, hub_layer in enumerate(hub_layers)
        ]
        self._layers = [_JointLayer(layers, i, layer, runner) for i, layer in enumerate(joint)]
        self.backbone = with_layers(decoder.backbone, decoder.list_name, self._layers)
        # What it was built of: somebody may exchange modules, or adapters in them, later.
        parts = [*hub_layers, *(expert.layers for expert in experts.values())]
        self._runner, self._backbone = runner, decoder.backbone
        modules = dict.fromkeys([decoder.backbone, *(module for part in parts for module in part.modules())])
        self._built = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        # What tells of hooks, held here because it is asked for of a thousand modules, once per token.
        self._watchable = [
            (module, module.__dict__, module._forward_hooks, module._forward_pre_hooks)
            for module in modules
            if not isinstance(module, _NEVER_CALLED)
        ]

    def is_whole(self) -> bool:
        """Whether the models are built as they were, and nobody watches or has replaced what their modules do."""
        if any(now != then for now, then in self._built):
            return False
        suspects = [
            module for module, own, hooks, pre_hooks in self._watchable if hooks or pre_hooks or "forward" in own
        ]
        return not any(map(self._is_watched, suspects))

    def _is_watched(self, module: nn.Module) -> bool:
        """Whether hooks of others, or a `forward` of its own, would not be called, or called for all rows at once."""
        if "forward" in vars(module) and module is not self._backbone:
            return True
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        return any(
            getattr(hook, "__self__", None) is not self._runner
            and not isinstance(getattr(hook, "__self__", None), ExpertParallel)
            and getattr(hook, "__module__", "") != _COLLECTOR
            for hook in hooks
        )


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
        raise NotStackable(f"their layers take a tensor of shape {tuple(value.shape)} beside hidden states")

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


def _under_way(runner: ForwardRunner) -> tuple[ForwardState, JointExecutor]:
    """The state of the forward under way, and its executor, which runs the joint layers."""
    state = runner.current()
    assert state is not None
    executor = getattr(state.executor, "inner", state.executor)  # of several processes, each has one inside
    assert isinstance(executor, JointExecutor)
    return state, executor


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
            except NotStackable as error:
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
            NotStackable: If something differs by more than rounding, or a layer cannot be called so.
        """
        backbone, layers = self._decoder.backbone, self._decoder.layers
        config = text_config(backbone)
        device = token_embeddings(backbone).weight.device
        call = {"input_ids": torch.arange(1, 9, device=device).view(2, 4) % config.vocab_size, "use_cache": False}
        composition = Composition({}, len(layers), config, model.experts, False)
        model_lanes: dict[Hashable, Lane] = {name: Lane(name, None, None) for name in model.experts}
        alone = with_layers(backbone, self._decoder.list_name, [_unstitched(layer) for layer in layers])
        states = []
        for make in (run_in_turn, partial(_joint_executor, model, model_lanes)):
            state = ForwardState(composition, call, None, make)
            state.start()
            try:
                hub = self._runner.inside(state, partial(state.executor.run_hub, partial(alone, **call)))[0]
            except (RuntimeError, ValueError, TypeError) as error:
                raise NotStackable(f"a batch of all fails: {error}") from error
            states.append({"hub": hub, **state.final_states().by_name})
        for name, expected in states[0].items():
            if isinstance(expected, FakeTensor):
                continue
            distance = (states[1][name] - expected).double().norm() / expected.double().norm()
            if not distance <= 64 * torch.finfo(expected.dtype).eps:
                raise NotStackable(f"a batch of all gives other results for {name!r}")

    def _applies(self, state: ForwardState, model: JointModel) -> bool:
        """Whether this forward can run so: in inference, with a cache of keys and values, if nothing else is asked."""
        call, backbone = state.call, self._decoder.backbone
        if torch.is_grad_enabled() or backbone.training:
            return False
        if any(call.get(name) for name in _NOT_COLLECTED) or any(
            getattr(backbone.config, name, False) for name in _NOT_COLLECTED
        ):
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


def why_not(decoder: Decoder, expert: Expert) -> Optional[str]:
    """Why an expert cannot run with the hub as rows of one batch; `None` if it can."""
    if isinstance(expert, AbsentExpert):
        return f"in process {expert.owner} of this model"
    model = expert.model
    if not isinstance(model, PeftModel):
        return "it is a full model"
    if not has_layers(decoder):
        return "the hub runs in another process"
    layers = [_unstitched(layer) for layer in decoder.layers]
    inner = set(expert.layers.modules())
    if len(expert.layers) != len(layers) or not _share(layers, expert.layers):
        return "it is an adapter on a model of its own"
    if any(parameter.device.type == "meta" for parameter in decoder.backbone.parameters()):
        return "the hub's weights are not all in memory"
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in decoder.backbone.modules()):
        return "the hub has trained modules besides the stitches (modules_to_save)"
    if is_dispatched(model.get_base_model()):
        return "accelerate has spread the hub over devices"
    for config in (model.peft_config[adapter] for adapter in model.active_adapters):
        if config.peft_type != "LORA":
            return f"it is a {peft_type_name(config.peft_type)} adapter, no LoRA"
        for option in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices"):
            if getattr(config, option, None):
                return f"its LoRA has {option}"
    head = model.get_output_embeddings()
    for module in model.get_base_model().modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "it has trained modules besides LoRA"
        if isinstance(module, LoraLayer) and module is not head and module not in inner:
            return "its LoRA goes beyond decoder layers and head"
        if isinstance(module, LoraLayer) and module.merged:
            return "its LoRA is merged"
    return None


def _unstitched(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, StitchLayer) else layer


def _share(hub_layers: Iterable[nn.Module], layers: Iterable[nn.Module]) -> bool:
    """Return whether an adapter's layers are the hub's own weights, with adapters."""
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return all(id(parameter) in theirs for layer in hub_layers for parameter in layer.parameters())


def _joint(hub: nn.Module, experts: dict[str, nn.Module], runner: ForwardRunner) -> nn.Module:
    """A module of the hub over a batch of all, in the place of the same module of hub and experts."""
    loras = {name: module for name, module in experts.items() if isinstance(module, LoraLayer)}
    if loras:
        for name, lora in loras.items():
            if not isinstance(lora, nn.Module) or not hasattr(lora, "lora_A") or lora.lora_embedding_A:
                raise NotStackable(f"the LoRA of {name!r} is on a {type(hub).__name__}")
            if any(id(weight) not in set(map(id, hub.parameters())) for weight in lora.get_base_layer().parameters()):
                raise NotStackable(f"the LoRA of {name!r} is on weights of its own")
        return JointLinear(hub, loras, runner)
    if any(module._modules.keys() != hub._modules.keys() for module in experts.values()):
        raise NotStackable("their layers are built of different modules")
    children = {
        name: _joint(child, {who: module.get_submodule(name) for who, module in experts.items()}, runner)
        for name, child in hub._modules.items()
        if child is not None
    }
    if all(children[name] is hub._modules[name] for name in children):
        return hub
    twin = with_modules(hub, {**hub._modules, **children})
    twin.__dict__["training"] = False
    return twin
