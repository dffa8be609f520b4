"""One flat list of layers for all models of an exported composition, and one flat cache with a layer for each.

Serving engines expect that: every attention layer has the number of its place in the list. The models' own backbones
count their own layers; what is here stands between the two ways of counting.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache

from ..forward.cache import cache_like, cached_tokens
from ..forward.masks import view_of


class FlatLayers(list[Any]):
    """The layers of a cache that has one for every decoder layer of a composition."""


class LayerRange:
    """One model's stretch of the flat list: its layers by its own count, and its view of the flat cache."""

    def __init__(self, layers: nn.ModuleList, first: int, num_layers: int, config: Any) -> None:
        self._layers, self.first, self.num_layers, self.config = layers, first, num_layers, config

    def __getitem__(self, index: int) -> FlatCall:
        return FlatCall(self._layers[self.first + index])

    def __len__(self) -> int:
        return self.num_layers

    def view(self, cache: Cache) -> Cache:
        """The cache as this model's backbone knows it: lengths are asked for by its own count of layers."""
        view = copy.copy(cache)
        view.layers = cache.layers[self.first : self.first + self.num_layers]
        view.flat = cache  # type: ignore[attr-defined]  # for `_flat`
        return view


class FlatCall:
    """A layer that is called with the flat cache instead of its model's view: it counts by the flat list."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_flat(value) for value in args)
        return self.layer(*args, **{name: _flat(value) for name, value in kwargs.items()})


def _flat(value: Any) -> Any:
    """For a model's view, the flat cache behind it; anything else as it is."""
    return value.flat if isinstance(value, Cache) else value  # type: ignore[attr-defined]  # set by `LayerRange.view`


def check_paged_cache(configs: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a paged cache, and the masks that go with it, suit all models.

    transformers makes both for continuous batching from one config, with one shape of keys and values for all layers.

    Args:
        configs: The models' text configs by name, the hub's first.
    """
    (_, hub), *others = configs.items()
    for name, config in others:
        if (*_paged_shape(hub), *view_of(hub)) != (*_paged_shape(config), *view_of(config)):
            raise ValueError(
                f"Continuous batching keeps the states of all models in one paged cache, which is made for the hub "
                f"({hub.model_type}), and expert {name!r} ({config.model_type}) does not attend as the hub does: it "
                "needs the same architecture, key-value heads, head size and windows. Use `generate()` with a "
                "left-padded batch, or vLLM."
            )


def _paged_shape(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    kv_heads, size = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    return kv_heads or heads, size or config.hidden_size // heads


def flatten_cache(cache: Cache, ranges: dict[str, LayerRange]) -> None:
    """Give an empty cache a layer for every decoder layer, each of the kind that its own model wants.

    Raises:
        ValueError: If it holds tokens already, of another model.
    """
    if isinstance(cache.layers, FlatLayers):
        return
    if cached_tokens(cache):
        raise ValueError("The cache holds tokens of another model. Start with an empty cache.")
    own = [cache_like(cache, part.config, f"model {name!r}") for name, part in ranges.items()]
    cache.layers = FlatLayers(layer for part in own for layer in part.layers)
