"""Experts of one architecture as one batch: what their layers do for a token is one operation for all of them.

Experts differ in their weights only. Their hidden states are put together as the sequences of one batch, the first
expert's layers run over it, and where a layer has weights, each expert's share of the batch meets its own: linear
layers multiply a stack of matrices at once, (N, out, in) by (N, in, tokens), and all others are called expert by
expert. The experts' own parameters become views of the stacks, so nothing is in memory twice.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..forward.cache import is_plain
from ..forward.expert import Expert
from ..forward.placement import is_dispatched
from ..forward.stream import Checkpoint, LayerCall, Layers, Stream, StreamLike
from .joint_layers import MOST_SEQUENCES, JointCacheLayer, NotStackable, ParameterView, StackedLinear, as_one, settings


# Of configs: what does not tell what layers do.
_NOT_ARCHITECTURE = {
    *("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures"),
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "tie_word_embeddings"),
}


class Stack:
    """Experts that run as one.

    Args:
        experts: Two or more that are alike (`_check_alike`), by name.

    Raises:
        NotStackable: If they cannot; nothing has been changed then.
    """

    def __init__(self, experts: dict[str, Expert]) -> None:
        self.experts = experts
        self.layers = [as_one(layers) for layers in zip(*(expert.layers for expert in experts.values()))]
        # What the experts are built of now: somebody may exchange modules, or adapters in them, meanwhile.
        modules = [module for expert in experts.values() for module in expert.layers.modules()]
        self._built = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        tuners = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._tuners = [(module, copy.deepcopy(settings(module))) for module in tuners]
        self._views: list[ParameterView] = []
        try:
            for layer in self.layers:
                for module in layer.modules():
                    if isinstance(module, StackedLinear):
                        views = module.stack()
                        self._views += views
                        for view in views:
                            view.parameter.data = view.part
            if not self._is_whole():
                raise NotStackable("some of their layers share weights")
            self._check_results()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give every expert weights of its own again."""
        for view in self._views:
            view.leave()
        self._views, self.layers = [], []

    def _is_whole(self) -> bool:
        """Return whether the experts are as they were put together: a move or a cast gives them other weights."""
        return (
            all(view.is_taken() for view in self._views)
            and all(now == then for now, then in self._built)
            and all(settings(module) == then for module, then in self._tuners)
        )

    def join(
        self, streams: dict[Hashable, Stream], experts: Mapping[str, Any], caches: Mapping[str, Cache]
    ) -> dict[Hashable, StreamLike]:
        """Return what to run in the place of these experts' streams; nothing if this forward cannot run them as one.

        Args:
            streams: Just begun, by expert name.
            experts: Of the forward.
            caches: Of the experts, by name; none without a cache.
        """
        if any(experts.get(name) is not expert or name not in streams for name, expert in self.experts.items()):
            return {}  # other experts take part, or (dropping.py) streams of some sequences only
        layers = self.layers  # another thread may be at `release`
        mine = [streams[name] for name in self.experts]
        batch, new_tokens = mine[0].state.shape[:2]
        if new_tokens > 1 or (mine[0].state.device.type == "cpu" and batch > MOST_SEQUENCES):
            return {}
        own = [caches[name] for name in self.experts if name in caches]
        if not layers or not all(is_plain(cache) for cache in own) or not self._is_whole():
            return {}
        try:
            joint = _joint_stream(layers, mine, own)
        except NotStackable:
            return {}
        return {name: _Lane(joint, i) for i, name in enumerate(self.experts)}

    @torch.no_grad()
    def _check_results(self) -> None:
        """Compare with every expert alone, layer by layer: over a token behind two others."""
        experts = list(self.experts.values())
        some = torch.arange(1, 7) % min(expert.config.vocab_size for expert in experts)  # not all of them padding
        tokens = some.view(2, 3).split([2, 1], dim=1)
        caches = [DynamicCache(config=expert.config) for expert in experts]
        if not all(is_plain(cache) for cache in caches):
            raise NotStackable("they keep other things than keys and values in their caches")
        config = experts[0].config
        for ids in tokens:
            streams = [expert({"input_ids": ids}, cache, config) for expert, cache in zip(experts, caches)]
            if ids is tokens[0]:
                for stream in streams:
                    stream.advance(stream.num_layers)
        joint = _joint_stream(self.layers, streams, copy.deepcopy(caches))
        for done in range(1, 1 + len(self.layers)):
            joint.parts = [stream.state for stream in streams]
            try:
                joint.advance(done)
            except Exception as error:
                raise NotStackable(f"layer {done - 1} of a batch of all fails: {error}") from error
            for part, stream in zip(joint.parts, streams):
                alone = stream.advance(done)
                distance = (part - alone).double().norm() / alone.double().norm()
                digits = torch.finfo(alone.dtype).eps
                if not distance <= (8 if digits > 1e-4 else 64) * digits:
                    raise NotStackable(f"layer {done - 1} of a batch of all gives other results")


class _JointStream(Stream):
    """Streams of N experts as one of a batch of all.

    Attributes:
        parts: The experts' hidden states, each (B, T, D).
    """

    def __init__(self, layers: Sequence[nn.Module], calls: list[LayerCall], parts: list[Tensor]) -> None:
        super().__init__(layers, calls)
        self.parts = parts

    def advance(self, layers_done: int, checkpoint: Optional[Checkpoint] = None) -> Tensor:
        if self._done < layers_done:
            self.state = torch.cat(self.parts)
            super().advance(layers_done)
            self.parts = list(self.state.chunk(len(self.parts)))
        return self.state


class _Lane:
    """One expert's share of a `_JointStream`, to be used as a `Stream`."""

    def __init__(self, joint: _JointStream, place: int) -> None:
        self._joint, self._place = joint, place

    @property
    def layers(self) -> Layers:
        return self._joint.layers

    @property
    def num_layers(self) -> int:
        return self._joint.num_layers

    @property
    def state(self) -> Tensor:
        return self._joint.parts[self._place]

    @state.setter
    def state(self, state: Tensor) -> None:
        self._joint.parts[self._place] = state

    def advance(self, layers_done: int, checkpoint: Optional[Checkpoint] = None) -> Tensor:
        self._joint.advance(layers_done)
        return self.state


@contextmanager
def stacked(experts: Mapping[str, Expert]) -> Iterator[list[Stack]]:
    """Stacks of those experts that are alike, as few as possible, for a while.

    Raises:
        ValueError: If no two of them are.
    """
    reasons: list[str] = []
    left = dict(sorted(experts.items()))
    with ExitStack() as entered:
        stacks: list[Stack] = []
        while left:
            first = next(iter(left))
            alike = {first: left.pop(first)}
            for name, expert in list(left.items()):
                try:
                    _check_alike({**alike, name: expert})
                except NotStackable as error:
                    reasons.append(f"{first!r} and {name!r}: {error}")
                else:
                    alike[name] = left.pop(name)
            if len(alike) > 1:
                try:
                    stack = Stack(alike)
                except NotStackable as error:
                    reasons.append(f"{', '.join(map(repr, alike))}: {error}")
                else:
                    entered.callback(stack.release)
                    stacks.append(stack)
        if not stacks:
            why = "; ".join(reasons) or f"there is only {', '.join(map(repr, experts)) or 'none'}"
            raise ValueError(f"stack=True needs two experts of one architecture that can run as one batch. {why}.")
        yield stacks


def _check_alike(experts: dict[str, Expert]) -> None:
    first, *others = experts.values()
    if any(is_dispatched(expert.model) for expert in experts.values()):
        raise NotStackable("accelerate has spread one over devices")
    for other in others:
        if other.model is first.model:
            raise NotStackable("they are the same model")
        if type(first.model) is not type(other.model) or _architecture(first) != _architecture(other):
            raise NotStackable("their architectures or configs differ")
    places = [
        [(name, p.shape, p.dtype, p.device) for name, p in expert.layers.named_parameters()]
        for expert in experts.values()
    ]
    if any(place != places[0] for place in places[1:]):
        raise NotStackable("their weights differ in name, shape, dtype or device")
    weights = {id(p): p for expert in experts.values() for p in expert.layers.parameters() if p.numel()}.values()
    if any(p.is_inference() for p in weights):
        raise NotStackable("their weights were made in inference mode")
    if len({p.data_ptr() for p in weights}) < len(weights):
        raise NotStackable("some of their weights share memory")
    if len({place[3] for place in places[0]}) > 1:
        raise NotStackable("their layers are on several devices")


def _architecture(expert: Expert) -> dict[str, Any]:
    return {name: value for name, value in expert.config.to_dict().items() if name not in _NOT_ARCHITECTURE}


def _joint_stream(layers: Sequence[nn.Module], streams: Sequence[Stream], caches: Sequence[Cache]) -> _JointStream:
    cache = None
    if caches:
        sizes = [len(stream.state) for stream in streams]
        layer_caches = [JointCacheLayer(parts, sizes) for parts in zip(*(cache.layers for cache in caches))]
        cache = Cache(layers=layer_caches)  # type: ignore[arg-type]  # need not be subclasses of transformers'
    parts = [stream.state for stream in streams]
    batch, number = len(parts[0]), len(parts)
    calls = [
        LayerCall(parts[0], *(for_all(value, batch, number, cache) for value in (args, kwargs)))
        for _, args, kwargs in streams[0].calls
    ]
    return _JointStream(layers, calls, parts)


def for_all(value: Any, batch: int, number: int, cache: Optional[Cache]) -> Any:
    """Widen a call of one expert's layer to the batch of all. Their configs are the same, so the call is, too."""
    if isinstance(value, Cache):
        return cache
    if isinstance(value, (tuple, list)):
        return type(value)(for_all(each, batch, number, cache) for each in value)
    if isinstance(value, dict):
        return {name: for_all(each, batch, number, cache) for name, each in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if len(value) == batch:
        return value.repeat(number, *[1] * (value.dim() - 1))
    if len(value) == 1:
        return value
    raise NotStackable(f"their layers take a tensor of shape {tuple(value.shape)} beside hidden states")
