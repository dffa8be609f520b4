"""An expert beside the hub: its decoder layers, run a few at a time, with everything they need.

A decoder layer wants more than hidden states: rotary positions, masks for its kind of attention, cache arguments.
What those are differs with every architecture, and only the expert's own backbone knows. So the backbone runs
once per forward, unchanged, with *recorders* in the place of its layers: each stores the arguments its layer would
get and passes the hidden states through. The layers then run later, when the stitches ask for them, with just
those arguments. The result equals the expert alone bit for bit, for every architecture.
"""

from __future__ import annotations

import copy
import inspect
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache

from .._compat.transformers import keep_output_capture, no_output_capture
from .decoder import Decoder, find_decoder, text_config
from .masks import expert_mask
from .placement import execution_device, is_dispatched
from .thread_local import PerThread


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


class StandIn(nn.Module):
    """In the place of another module, to whose attributes it answers: a layer's `attention_type` and the like."""

    def _original(self) -> nn.Module:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._original(), name)


class _Recorder(StandIn):
    """Stands in for one decoder layer: records the call, hands the hidden states on in the layer's own shape."""

    def __init__(self, layers: Sequence[nn.Module], index: int, tape: PerThread, tuple_size: Optional[int]) -> None:
        super().__init__()
        self.__dict__.update(_layers=layers, _index=index)  # not as submodules: the layers belong to the model
        self._tape, self._tuple_size = tape, tuple_size

    def _original(self) -> nn.Module:
        return self.__dict__["_layers"][self.__dict__["_index"]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self._tape.get().append((hidden, args, kwargs))
        return hidden if self._tuple_size is None else (hidden, *[None] * (self._tuple_size - 1))


class _Probe(StandIn):
    """Runs a decoder layer once to see what it returns: a tensor (`None`) or a tuple of some size."""

    def __init__(self, layer: nn.Module, sizes: dict[type, Optional[int]], widths: set[int]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self._sizes, self._widths = sizes, widths

    def _original(self) -> nn.Module:
        return self.__dict__["_layer"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._layer(*args, **kwargs)
        self._sizes[type(self._layer)] = len(out) if isinstance(out, tuple) else None
        self._widths.add((out[0] if isinstance(out, tuple) else out).shape[-1])
        return out


def with_modules(module: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A shallow twin of a module, without hooks, that has other submodules."""
    twin = copy.copy(module)
    for patched in ("forward", "_old_forward", "_hf_hook"):  # accelerate's hooks are bound to the original
        twin.__dict__.pop(patched, None)
    for hooks in [name for name in twin.__dict__ if name.startswith(("_forward_", "_backward_"))]:
        if twin.__dict__[hooks] is not None:
            twin.__dict__[hooks] = type(twin.__dict__[hooks])()
    twin.__dict__["_modules"] = modules
    return twin


def with_layers(backbone: nn.Module, list_name: str, layers: Sequence[nn.Module]) -> nn.Module:
    """A shallow twin of a backbone that shares all but its decoder layers."""
    twin = with_modules(backbone, {**backbone._modules, list_name: nn.ModuleList(layers)})
    twin.__dict__["training"] = False
    return twin


def layer_return_sizes(decoder: Decoder, device: torch.device) -> tuple[list[Optional[int]], int]:
    """What every decoder layer returns (`None`: a tensor, else the size of the tuple), and the hidden states' width.

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


class Planner:
    """Records what every layer of a backbone would be called with, and hands out the layers to run with it.

    Args:
        backbone: The module whose forward loops over decoder layers; it is run with recorders in their place.
        list_name: Its attribute that holds them.
        layers: The layers to run, looked up by index at every use: libraries may wrap layers in the meantime.
        tuple_sizes: Of every layer's return value, as `layer_return_sizes` finds them.
        config: The backbone's text config.
    """

    def __init__(
        self, backbone: nn.Module, list_name: str, layers: Sequence[nn.Module], tuple_sizes: list, config: Any
    ) -> None:
        signature = inspect.signature(backbone.forward).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        self._takes = set(signature)
        self._tape = PerThread()
        recorders = [_Recorder(layers, i, self._tape, size) for i, size in enumerate(tuple_sizes)]
        self._backbone = with_layers(backbone, list_name, recorders)
        self.layers, self._config = layers, config

    def start(
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
        tape: list[tuple] = []
        outer = self._tape.get()  # of a forward in whose middle this one was called
        self._tape.set(tape)
        try:
            with keep_output_capture():
                self._backbone(past_key_values=cache, use_cache=cache is not None, **kwargs)
        finally:
            self._tape.set(outer)
        return Stream(self.layers, tape)


class Expert(nn.Module):
    """A frozen causal LM that runs beside the hub.

    Args:
        model: The expert, used as it is. It is put into eval mode and frozen; `release` undoes that.
        what: What to call it in errors, e.g. `"Expert 'code'"`.

        source: What the model was loaded from, if it was loaded for this; another adapter may then share it.

    Attributes:
        width: Of its hidden states.
        num_layers: Number of its decoder layers.
        key: Tells experts apart; a copy of an expert has the same.

    Raises:
        ValueError: As `find_decoder`.
    """

    def __init__(self, model: nn.Module, what: str, source: Optional[dict] = None) -> None:
        super().__init__()
        self.source = source
        self.key = uuid.uuid4().hex
        decoder = find_decoder(model, what)
        self._restore = model.training, [p for p in model.parameters() if p.requires_grad]
        self.model = model.eval().requires_grad_(False)
        self.num_layers = len(decoder.layers)
        try:
            sizes, self.width = layer_return_sizes(decoder, self._embedding_device)
        except BaseException:
            self.release()
            raise
        self._planner = Planner(decoder.backbone, decoder.list_name, decoder.layers, sizes, self.config)

    def release(self) -> nn.Module:
        """Give the model back with the training flag and the `requires_grad` flags that it came with."""
        was_training, trainable = self._restore
        for parameter in trainable:
            parameter.requires_grad_(True)
        return self.model.train(was_training)

    def train(self, mode: bool = True) -> Expert:
        """Experts have no dropout of their own, whatever the mode of the whole model."""
        return super().train(False)

    def named_modules(self, memo: Optional[set] = None, prefix: str = "", remove_duplicate: bool = True):
        """All modules but those of a LoRA expert that PEFT would take for parts of the stitch adapter."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)):
                yield name, module

    @property
    def layers(self) -> nn.ModuleList:
        return self._planner.layers

    @property
    def config(self) -> Any:
        return text_config(self.model)

    @property
    def _embedding_device(self) -> torch.device:
        """Where the expert's embeddings are computed."""
        embeddings = self.model.get_input_embeddings()
        return execution_device(embeddings) or embeddings.weight.device

    def _apply(self, fn: Callable, recurse: bool = True) -> Expert:
        """An expert that accelerate has spread over devices, CPU and disk stays there when the whole model moves."""
        return self if is_dispatched(self.model) else super()._apply(fn, recurse)

    def forward(self, call: dict[str, Any], cache: Optional[Cache], hub_config: Any) -> Stream:
        """Begin a forward, see `Planner.start`.

        It is the module's call, so that what hooks into modules (FSDP2) has the embeddings at hand by then.
        """
        return self._planner.start(call, cache, hub_config, self._embedding_device)


def position_ids(call: dict[str, Any], mask: Optional[Tensor], cache: Optional[Cache]) -> Tensor:
    """Positions (1 or B, T) of this call's tokens: their count among the tokens that are not padding."""
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    past = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(tokens.shape[1], device=tokens.device) + past
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places[None]
    return (mask.to(tokens.device).long().cumsum(-1) - 1).clamp(min=0).index_select(1, places)


def cached_tokens(cache: Optional[Cache]) -> Optional[int]:
    """Tokens that a cache holds; `None` where that is not known: static caches count in a tensor while compiling."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # linear attention only: no length is kept
        return None
    return None if isinstance(length, Tensor) and torch.compiler.is_compiling() else int(length)


class Stream:
    """A model's forward under way: its hidden states (B, T, D_i) and the layers still to run.

    Args:
        layers: The decoder layers.
        tape: For each, what it is called with: hidden states (only the first's are used), `args` and `kwargs`.
    """

    def __init__(self, layers: Sequence[nn.Module], tape: list[tuple]) -> None:
        self.layers, self.tape = layers, tape
        self.state: Tensor = tape[0][0]
        self._done = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def advance(self, layers_done: int, checkpoint: Optional[Callable] = None) -> Tensor:
        """Run layers until `layers_done` of them are done; return the hidden states.

        Args:
            checkpoint: The hub's gradient checkpointing function, if it is on: layers whose input carries a gradient
                run under it.
        """
        if self._done < layers_done:
            # Dynamo keeps the collector elsewhere, and has no hooks of an earlier life to shield it from.
            with nullcontext() if torch.compiler.is_compiling() else no_output_capture():
                for i in range(self._done, layers_done):
                    self.state = self._run(i, checkpoint)
            self._done = layers_done
        return self.state

    def _run(self, i: int, checkpoint: Optional[Callable]) -> Tensor:
        layer, (_, args, kwargs) = self.layers[i], self.tape[i]
        if checkpoint is not None and self.state.requires_grad:
            out = checkpoint(_WithKwargs(layer, kwargs), self.state, *args)
        else:
            out = layer(self.state, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _WithKwargs:
    """A layer with its keyword arguments bound, for checkpoint functions that take positional arguments only."""

    def __init__(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        self.layer, self.kwargs = layer, kwargs

    def __call__(self, *args: Any) -> Any:
        return self.layer(*args, **self.kwargs)
