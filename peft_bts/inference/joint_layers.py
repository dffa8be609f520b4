"""The layers of several experts as one, over a batch of all: what stacking.py puts together.

Shapes: N experts, B sequences of each; a batch of all is (N * B, ...), the first expert's sequences first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeGuard, Union

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from ..forward.recorder import StandIn, with_modules


# Sequences, on a CPU, up to which one operation for all experts is faster than one for each (benchmarks/speed.py).
MOST_SEQUENCES = 2


class NotStackable(ValueError):
    """Says why experts cannot run as one."""


@dataclass
class ParameterView:
    """A parameter of an expert, and the part of a stack that it is to be a view of."""

    module: nn.Module
    name: str
    parameter: Tensor
    part: Tensor

    def is_taken(self) -> bool:
        return (
            self.module._parameters.get(self.name) is self.parameter
            and self.parameter.data_ptr() == self.part.data_ptr()
            and self.parameter.dtype == self.part.dtype
        )

    @torch.inference_mode(False)
    def leave(self) -> None:
        if self.parameter.data_ptr() == self.part.data_ptr():
            self.parameter.data = self.parameter.data.clone()


AnyLinear = Union[nn.Linear, Conv1D]


class StackedLinear(nn.Module):
    """Linear layers of N experts as one, over a batch (N * B, ..., in). Those of gpt2 (`Conv1D`) are (in, out)."""

    layers: list[AnyLinear]

    def __init__(self, layers: Sequence[AnyLinear]) -> None:
        super().__init__()
        self.__dict__["layers"] = list(layers)  # not as submodules: they belong to the experts
        self.bias_N1O: Optional[Tensor] = None

    @torch.inference_mode(False)  # weights made in that mode could not take part in training any more
    def stack(self) -> list[ParameterView]:
        """Copy the weights into stacks, and return where each of the experts' parameters is there."""
        self.weight = torch.stack([layer.weight.data for layer in self.layers])
        self.weight_NOI = self.weight.transpose(1, 2) if isinstance(self.layers[0], Conv1D) else self.weight
        views = [ParameterView(layer, "weight", layer.weight, part) for layer, part in zip(self.layers, self.weight)]
        if self.layers[0].bias is not None:
            bias = torch.stack([layer.bias.data for layer in self.layers])
            self.bias_N1O = bias[:, None]
            views += [ParameterView(layer, "bias", layer.bias, part) for layer, part in zip(self.layers, bias)]
        return views

    def forward(self, x: Tensor) -> Tensor:
        x_NTI = x.reshape(len(self.layers), -1, x.shape[-1])
        if x.dtype == torch.float32 and x.device.type == "cpu" and x_NTI.shape[1] <= MOST_SEQUENCES:
            # The same product, transposed: twice as fast with few tokens in float32, and half as fast in bfloat16.
            y_NTO = torch.bmm(self.weight_NOI, x_NTI.transpose(1, 2)).transpose(1, 2)
        else:
            y_NTO = torch.bmm(x_NTI, self.weight_NOI.transpose(1, 2))
        if self.bias_N1O is not None:
            y_NTO = y_NTO + self.bias_N1O
        return y_NTO.reshape(*x.shape[:-1], y_NTO.shape[-1])


class _InTurn(StandIn):
    """Any other module with weights: every expert's own, over its share of the batch."""

    each: list[nn.Module]

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["each"] = list(modules)

    def _original(self) -> nn.Module:
        return self.__dict__["each"][0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = []
        for i, module in enumerate(self.each):
            mine = [_share(value, len(self.each), i) for value in args]
            out.append(module(*mine, **{name: _share(value, len(self.each), i) for name, value in kwargs.items()}))
        if isinstance(out[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*out))
        return torch.cat(out)


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


def as_one(modules: Sequence[nn.Module]) -> nn.Module:
    """A module over the batch of all, in the place of the same module of every expert."""
    first = modules[0]
    if any(type(module) is not type(first) or module._modules.keys() != first._modules.keys() for module in modules):
        raise NotStackable("their layers are built of different modules")
    if all(module is first for module in modules):
        return first
    has_tensors = any(value is not None for value in (*first._parameters.values(), *first._buffers.values()))
    if not has_tensors:
        if any(settings(module) != settings(first) for module in modules):
            raise NotStackable(f"their {type(first).__name__} differ in a setting")
        return with_modules(first, {name: _child_as_one(modules, name) for name in first._modules})
    if any(len(list(part.parameters())) for part in first.children()):
        raise NotStackable(f"their {type(first).__name__} has weights beside those of its parts")
    if _are_plain_linear(modules):
        weights = {id(module.weight) for module in modules}
        if len(weights) == 1 and len({id(module.bias) for module in modules}) == 1:
            return first  # of the seed, which its LoRA experts share
        if len(weights) == len(modules):
            return StackedLinear(modules)
    return _InTurn(modules)


def _child_as_one(modules: Sequence[nn.Module], name: str) -> Optional[nn.Module]:
    children = [child for module in modules if (child := module._modules[name]) is not None]
    if len(children) not in (0, len(modules)):
        raise NotStackable(f"some of their {type(modules[0]).__name__} lack {name!r}")
    return as_one(children) if children else None


def _are_plain_linear(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[AnyLinear]]:
    """Return whether these are linear layers, of no subclass, with weights in no format of a quantiser's."""
    return all(type(module) in (nn.Linear, Conv1D) and type(module.weight.data) is Tensor for module in modules)


def settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and the like among a module's attributes, such as a LoRA's scaling."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple, set, frozenset)):
            return all(map(is_plain, value))
        if isinstance(value, dict):
            return all(map(is_plain, value.values()))
        return isinstance(value, (str, int, float, type(None), torch.dtype))

    others = ("_modules", "_is_hf_initialized")  # the latter: how it came to be, not what it does
    return {name: value for name, value in vars(module).items() if name not in others and is_plain(value)}


def _share(value: Any, number: int, place: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == 1:
        return value
    return value.chunk(number)[place]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one along their first dimension; without a copy, where they lie in memory so."""
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
