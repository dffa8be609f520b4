"""What a model's decoder layers are called with, recorded from its own backbone.

A decoder layer wants more than hidden states: rotary positions, masks for its kind of attention, cache arguments.
What those are differs with every architecture, and only the model's own backbone knows. So the backbone runs once per
forward, unchanged, with *recorders* in the place of its layers: each stores the arguments its layer would get and
passes the hidden states through. The layers then run later, when the stitches ask for them, with just those arguments
(stream.py). The result equals the model alone bit for bit, for every architecture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import Cache

from .._compat.transformers import no_output_capture
from ..modules import M
from .cache import cached_tokens
from .decoder import Decoder
from .masks import expert_mask
from .stream import LayerCall, Layers, Stream
from .thread_local import ThreadLocal


# What belongs to the hub's own call: experts get a cache of their own, and nobody reads their other outputs.
_NOT_FOR_EXPERTS = {
    "past_key_values",
    "use_cache",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


# The calls recorded by the backbone that is running in this thread.
_RECORDED: ThreadLocal[list[LayerCall]] = ThreadLocal()


class StandIn(nn.Module):
    """In the place of another module, to whose attributes it answers: a layer's `attention_type` and the like."""

    def _original(self) -> Callable[..., Any]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._original(), name)


class _Recorder(StandIn):
    """Stands in for one decoder layer: records the call, hands the hidden states on in the layer's own shape."""

    def __init__(self, layers: Layers, index: int, tuple_size: Optional[int]) -> None:
        super().__init__()
        self.__dict__.update(_layers=layers, _index=index)  # not as submodules: the layers belong to the model
        self._tuple_size = tuple_size

    def _original(self) -> Callable[..., Any]:
        return self.__dict__["_layers"][self.__dict__["_index"]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        recorded = _RECORDED.get()
        assert recorded is not None  # recorders run inside of `ArgumentRecorder.record`
        recorded.append(LayerCall(hidden, args, kwargs))
        return hidden if self._tuple_size is None else (hidden, *[None] * (self._tuple_size - 1))


class _Probe(StandIn):
    """Runs a decoder layer once to see what it returns: a tensor (`None`) or a tuple of some size."""

    def __init__(self, layer: nn.Module, sizes: dict[type, Optional[int]], widths: set[int]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self._sizes, self._widths = sizes, widths

    def _original(self) -> Callable[..., Any]:
        return self.__dict__["_layer"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._layer(*args, **kwargs)
        self._sizes[type(self._layer)] = len(out) if isinstance(out, tuple) else None
        self._widths.add((out[0] if isinstance(out, tuple) else out).shape[-1])
        return out


def with_modules(module: M, modules: dict[str, Optional[nn.Module]]) -> M:
    """A shallow twin of a module, without hooks, that has other submodules."""
    twin = copy.copy(module)
    for patched in ("forward", "_old_forward", "_hf_hook"):  # accelerate's hooks are bound to the original
        twin.__dict__.pop(patched, None)
    for hooks in [name for name in twin.__dict__ if name.startswith(("_forward_", "_backward_"))]:
        if twin.__dict__[hooks] is not None:
            twin.__dict__[hooks] = type(twin.__dict__[hooks])()
    twin.__dict__["_modules"] = modules
    return twin


def with_layers(backbone: M, list_name: str, layers: Sequence[nn.Module]) -> M:
    """A shallow twin of a backbone that shares all but its decoder layers."""
    twin = with_modules(backbone, {**backbone._modules, list_name: nn.ModuleList(layers)})
    twin.__dict__["training"] = False
    return twin


def layer_return_sizes(decoder: Decoder, device: torch.device) -> tuple[list[Optional[int]], int]:
    """Return the form of every layer's output (`None`: a tensor, else a tuple's size), and the hidden states' width.

    Runs a forward over two tokens.
    """
    sizes: dict[type, Optional[int]] = {}
    widths: set[int] = set()
    probes = [_Probe(layer, sizes, widths) for layer in decoder.layers]
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad(), no_output_capture():
        with_layers(decoder.backbone, decoder.list_name, probes)(
            input_ids=tokens, past_key_values=None, use_cache=False
        )
    return [sizes[type(layer)] for layer in decoder.layers], widths.pop()


class ArgumentRecorder:
    """Records what every layer of a backbone would be called with, and hands out the layers to run with it.

    Args:
        backbone: The module whose forward loops over decoder layers; it is run with recorders in their place.
        list_name: Its attribute that holds them.
        layers: The layers to run, looked up by index at every use: libraries may wrap layers in the meantime.
        tuple_sizes: Of every layer's return value, as `layer_return_sizes` finds them.
        config: The backbone's text config.
    """

    def __init__(
        self,
        backbone: nn.Module,
        list_name: str,
        layers: Layers,
        tuple_sizes: Sequence[Optional[int]],
        config: Any,
    ) -> None:
        signature = inspect.signature(backbone.forward).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        self._takes = set(signature)
        recorders = [_Recorder(layers, i, size) for i, size in enumerate(tuple_sizes)]
        self._backbone = with_layers(backbone, list_name, recorders)
        self.layers, self._config = layers, config

    def record(
        self, call: dict[str, Any], cache: Optional[Cache], hub_config: Any, device: Optional[torch.device] = None
    ) -> Stream:
        """Begin a forward: embed the inputs of the hub's call and record every layer's arguments.

        Args:
            call: Arguments of the hub's backbone by name; those that this backbone knows are passed on.
            cache: The expert's own cache, or `None`.
            hub_config: The hub's text config, for which the masks in `call` may have been made.
            device: Where the backbone's inputs have to be; `None` leaves them.
        """
        kwargs = {
            name: value
            for name, value in call.items()
            if name not in _NOT_FOR_EXPERTS and (self._takes_any or name in self._takes)
        }
        if kwargs.get("input_ids") is not None:
            kwargs.pop("inputs_embeds", None)
        if kwargs.get("attention_mask") is not None:
            tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
            kwargs["attention_mask"] = expert_mask(
                kwargs["attention_mask"], hub_config, self._config, cached_tokens(cache), tokens.shape[1]
            )
        if "position_ids" not in call and "position_ids" in self._takes:
            # The hub has no use for positions (ALiBi), so no caller can give any. Nor would every backbone know how
            # many tokens its cache holds.
            kwargs["position_ids"] = position_ids(call, kwargs.get("attention_mask"), cache)
        if device is not None:
            kwargs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        calls: list[LayerCall] = []
        outer = _RECORDED.get()  # of a forward in whose middle this one was called
        _RECORDED.set(calls)
        try:
            self._backbone(past_key_values=cache, use_cache=cache is not None, **kwargs)
        finally:
            _RECORDED.set(outer)
        return Stream(self.layers, calls)


def position_ids(call: dict[str, Any], mask: Optional[Tensor], cache: Optional[Cache]) -> Tensor:
    """Positions (1 or B, T) of this call's tokens: their count among the tokens that are not padding."""
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    past = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(tokens.shape[1], device=tokens.device) + past
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places[None]
    return (mask.to(tokens.device).long().cumsum(-1) - 1).clamp(min=0).index_select(1, places)
