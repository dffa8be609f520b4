"""Modules for the hub and its LoRA experts over one batch: the hub's own layers, and LoRAs added to rows of it.

Shapes: as in joint_lora.py, which runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Protocol, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .._compat.peft import peft_type_name
from ..distributed.absent import AbsentExpert, has_layers
from ..distributed.parallel import ExpertParallel
from ..forward.decoder import Decoder
from ..forward.expert import Expert
from ..forward.hooks import ForwardRunner
from ..forward.layer import StitchLayer, behind_layer
from ..forward.placement import is_dispatched
from ..forward.recorder import StandIn, with_layers, with_modules
from ..forward.state import ForwardState


_COLLECTOR = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs are asked for
_NEVER_CALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)  # containers


class NotJoint(ValueError):
    """Says why experts cannot run as one batch with the hub."""


class Rows(Protocol):
    """What the modules of a `JointModel` ask of the executor that runs them.

    Attributes:
        loras: The rows of the batch of all that belong to each LoRA expert, with its name.
        number_of_rows: How many the batch of all has.
    """

    loras: list[tuple[str, slice]]
    number_of_rows: int

    def join(self, hub_BTD: Tensor) -> Tensor:
        """The hidden states of all: what a layer is to be called with."""
        ...

    def part(self, hidden: Tensor) -> Tensor:
        """Keep the experts' hidden states, and return the hub's."""
        ...

    def for_all(self, value: Any) -> Any:
        """Return what a layer of the hub is called with, for the batch of all."""
        ...


def _under_way(runner: ForwardRunner) -> tuple[ForwardState, Rows]:
    """The state of the forward under way, and its executor."""
    state = runner.current()
    assert state is not None
    executor = getattr(state.executor, "inner", state.executor)  # of several processes, each has one inside
    return state, cast(Rows, executor)


class JointLinear(nn.Module):
    """A linear layer of the hub over a batch of all: one product for all rows, each LoRA for its expert's rows."""

    base: nn.Module
    loras: Mapping[str, LoraLayer]
    runner: ForwardRunner

    def __init__(self, base: nn.Module, loras: Mapping[str, LoraLayer], runner: ForwardRunner) -> None:
        super().__init__()
        self.__dict__.update(base=base, loras=loras, runner=runner)  # not as submodules: they belong to the models

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)  # some layers ask their linear layers for sizes or dtypes

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
        return unstitched(self.__dict__["layers"][self._index])

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
        hub_layers = [unstitched(layer) for layer in layers]
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


class JointCacheLayer:
    """One layer of several models' caches, for the batch of all. What is kept is in their own layers, as ever.

    Args:
        parts: The models' own layers.
        sizes: How many sequences each of them is for.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = parts, list(sizes)
        self.plain = all(type(part) is DynamicLayer for part in parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts[0], name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.plain or not all(part.is_initialized for part in self.parts):
            new = zip(self.parts, keys.split(self.sizes), values.split(self.sizes))
            updated = [part.update(k, v, *args, **kwargs) for part, k, v in new]
            keys, values = (torch.cat(tensors) for tensors in zip(*updated))
            return keys, values
        keys = torch.cat([_joined([part.keys for part in self.parts]), keys], dim=-2)
        values = torch.cat([_joined([part.values for part in self.parts]), values], dim=-2)
        for part, k, v in zip(self.parts, keys.split(self.sizes), values.split(self.sizes)):
            part.keys, part.values = k, v
        return keys, values


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one along their first dimension; without a copy, where they lie in memory so."""
    if torch.compiler.is_compiling():
        return torch.cat(list(parts))  # addresses cannot be traced
    first, size = parts[0], parts[0].numel()
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    if all(
        part.is_contiguous()
        and part.shape == first.shape
        and part.untyped_storage().data_ptr() == storage
        and part.storage_offset() == start + i * size
        for i, part in enumerate(parts)
    ):
        return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride(), start)
    return torch.cat(list(parts))


def why_not(decoder: Decoder, expert: Expert) -> Optional[str]:
    """Why an expert cannot run with the hub as rows of one batch; `None` if it can."""
    if isinstance(expert, AbsentExpert):
        return f"in process {expert.owner} of this model"
    model = expert.model
    if not isinstance(model, PeftModel):
        return "it is a full model"
    if not has_layers(decoder):
        return "the hub runs in another process"
    layers = [unstitched(layer) for layer in decoder.layers]
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
        if isinstance(module, LoraLayer) and getattr(module, "lora_variant", None):
            return "its LoRA computes more than a product of two matrices"
    return None


def unstitched(layer: nn.Module) -> nn.Module:
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
                raise NotJoint(f"the LoRA of {name!r} is on a {type(hub).__name__}")
            if any(id(weight) not in set(map(id, hub.parameters())) for weight in lora.get_base_layer().parameters()):
                raise NotJoint(f"the LoRA of {name!r} is on weights of its own")
        return JointLinear(hub, loras, runner)
    if any(module._modules.keys() != hub._modules.keys() for module in experts.values()):
        raise NotJoint("their layers are built of different modules")
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
