"""One transformers `Cache` for all models.

`generate()` knows one cache, the hub's, and reorders, crops, repeats, resets and returns it. The experts' caches are
in there, held by one more layer behind the hub's own (`ExpertCaches`): whatever is done to all layers of the cache,
that layer does to the experts' caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .thread_local import ThreadLocal


if TYPE_CHECKING:
    from .composition import StitchableExpert
    from .evidence import Memory


class ExpertCaches:
    """The layer behind the hub's own layers in a stitched model's cache: it holds the experts' caches.

    It has what transformers asks of every layer of a cache (`Cache` in `cache_utils.py`, read in 5.18 and 5.23).

    Attributes:
        by_name: The experts' own caches.
        made_for: The `key` of each expert that they were made for.
        is_sliding: The same as for the hub's last layer, so that the first layer of each kind, for which masks are
            made, is one of the hub's.
        catch_up: If experts may be dropped, which tokens each expert has seen (inference/catching_up.py).
            The experts' caches are then held there, and `by_name` is empty.
        memory: What output gates with evidence go on from; `None` without such, or before the first token.
    """

    supports_early_init = False
    is_initialized = True
    keys = values = None

    def __init__(self, by_name: dict[str, Cache], made_for: dict[str, str], is_sliding: bool) -> None:
        self.by_name, self.made_for = by_name, made_for
        self.is_sliding = is_sliding
        self.catch_up: Any = None
        self.memory: Optional[Memory] = None

    @property
    def layers(self) -> list[Any]:
        """All layers of the experts' caches."""
        return [layer for cache in self.by_name.values() for layer in cache.layers]

    @property
    def is_compileable(self) -> bool:
        return all(cache.is_compileable for cache in self.by_name.values())

    @property
    def is_croppable(self) -> bool:
        return self.memory is None and all(cache.is_croppable for cache in self.by_name.values())

    @property
    def record_past(self) -> bool:
        return any(getattr(layer, "record_past", False) for layer in self.layers)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = value

    def get_max_length(self) -> int:
        return max((cache.get_max_length() for cache in self.by_name.values()), default=-1)

    def activate_past_recording(self) -> None:
        for cache in self.by_name.values():
            cache.activate_past_recording()

    def offload(self) -> None:
        """The experts' caches see to that themselves."""

    def prefetch(self) -> None:
        """The experts' caches see to that themselves."""

    def reset(self) -> None:
        self.memory = None
        for cache in self.by_name.values():
            cache.reset()

    def crop(self, *args: Any) -> None:
        self.memory = None  # what was expected behind the tokens that stay is not known any more
        for cache in self.by_name.values():
            cache.crop(*args)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_memory(lambda of_rows: of_rows.index_select(0, beam_idx.to(of_rows.device)))
        for cache in self.by_name.values():
            cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_memory(lambda of_rows: of_rows.repeat_interleave(repeats, dim=0))
        for cache in self.by_name.values():
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_memory(lambda of_rows: of_rows[indices.to(of_rows.device)])
        for cache in self.by_name.values():
            cache.batch_select_indices(indices)

    def _change_memory(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.memory is not None:
            self.memory = self.memory.of_rows(change)


def held_expert_caches(cache: Optional[Cache]) -> Optional[ExpertCaches]:
    """The experts' caches in a cache of the hub's; `None` if it has none yet."""
    last = cache.layers[-1] if cache is not None and cache.layers else None
    return last if isinstance(last, ExpertCaches) else None


def cached_tokens(cache: Optional[Cache]) -> Optional[int]:
    """Tokens that a cache holds; `None` where that is not known: static caches count in a tensor while compiling."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # linear attention only: no length is kept
        return None
    return None if isinstance(length, Tensor) and torch.compiler.is_compiling() else int(length)


# Whether tokens will be taken back from the caches made now, as drafts are. transformers tells the hub's layers before
# an expert's exist, and a hub's layers without windows do not note it.
_ROLLS_BACK: ThreadLocal[bool] = ThreadLocal()


@contextmanager
def caches_roll_back() -> Iterator[None]:
    """While this is active, make experts' caches created in this thread keep what a rollback needs."""
    before = _ROLLS_BACK.get()
    _ROLLS_BACK.set(True)
    try:
        yield
    finally:
        _ROLLS_BACK.set(before)


def check_cache(cache: Cache, experts: Mapping[str, StitchableExpert], forgetting: Optional[float] = None) -> None:
    """Raise `ValueError` if what the cache holds cannot be continued with these experts.

    Called before anything is computed, so that a refused cache is left as it was.

    Args:
        cache: The hub's.
        experts: The experts to run, by name.
        forgetting: The forgetting factor of output gates with evidence; `None` without such.
    """
    held, theirs = cached_tokens(cache), held_expert_caches(cache)
    if theirs is None:
        if held:
            raise ValueError(
                f"The cache holds {held} tokens of the hub alone: it was filled while the adapter was "
                "disabled, or by another model, and has no expert states. Start with an empty cache."
            )
        return
    if theirs.made_for != {name: expert.key for name, expert in experts.items()}:
        raise ValueError(
            f"The cache was filled with the experts {sorted(theirs.made_for)}; now {sorted(experts)} are active, or "
            "other models of these names. Start with an empty cache."
        )
    for name in theirs.made_for:
        seen = cached_tokens(theirs.by_name[name]) if theirs.catch_up is None else theirs.catch_up.seen
        if None not in (held, seen) and held != seen:
            raise ValueError(
                f"The cache holds {held} tokens of the hub but {seen} of expert {name!r}: it was used while the "
                "adapter was disabled. Start with an empty cache."
            )
    if forgetting is not None and held and (theirs.memory is None or theirs.memory.forgetting != forgetting):
        raise ValueError(
            "The output gates go by evidence, how well each model has predicted all tokens so far, and the cache does "
            "not hold that: it was cropped, or used under an adapter without evidence or with another forgetting "
            "factor. Start with an empty cache."
        )


def expert_caches(cache: Cache, hub_layers: int, experts: Mapping[str, StitchableExpert]) -> ExpertCaches:
    """Return the experts' caches in a cache of the hub's, making them if that was not done yet.

    Args:
        cache: The cache of the hub's call.
        hub_layers: Number of the hub's decoder layers.
        experts: The experts to run, by name.

    Raises:
        ValueError: For a kind of cache that cannot be made for an expert.
    """
    held = held_expert_caches(cache)
    if held is None:
        made = {name: cache_like(cache, expert.config, f"expert {name!r}") for name, expert in experts.items()}
        for own in made.values():
            if own.offloading and own.only_non_sliding and all(own.is_sliding):
                own.offloading = False  # nothing to offload, which transformers takes for an error
        make_layer = getattr(cache, "layer_class_to_replicate", None)
        if make_layer is not None:
            # DynamicCache() makes layers as they come; the hub's must all be there before the experts'.
            while len(cache.layers) < hub_layers:
                cache.layers.append(make_layer())
        is_sliding = getattr(cache.layers[-1], "is_sliding", False)
        held = ExpertCaches(made, {name: expert.key for name, expert in experts.items()}, is_sliding)
        cache.layers.append(held)  # type: ignore[arg-type]  # it need not be a subclass of transformers'
    if getattr(cache, "offloading", False):
        # Its last layer brings back the one behind, which is the experts' now, instead of its first.
        cache.prefetch(0, cache.only_non_sliding)
    return held


def count_tokens(cache: Cache, layer: int, batch: int, tokens: int, device: torch.device) -> None:
    """Have a layer of a cache count tokens of a model that another process runs: one number each, for keys and values.

    Masks, positions, crops and beams then find the lengths that they would find there.
    """
    if layer < len(cache.layers) and not isinstance(cache.layers[layer], CacheLayerMixin):
        return  # linear attention: no length is kept
    one = torch.zeros(batch, 1, tokens, 1, device=device)
    cache.update(one, one, layer)


def is_plain(cache: Cache) -> bool:
    """Return whether rows of an expert's cache can be split and joined: it holds only keys and values, in place."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return not getattr(cache, "offloading", False) and all(type(layer) in plain for layer in cache.layers)


def static_length(cache: StaticCache) -> int:
    """Return how many tokens a static cache can hold (its layers with a window hold fewer)."""
    return max(layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len"))


def cache_like(cache: Cache, config: Any, name: str) -> Cache:
    """An empty cache of the same kind, for a model of this config.

    Raises:
        ValueError: For a kind that cannot be made; `name` says which model it is for.
    """
    offloading: dict[str, Any] = {}
    if getattr(cache, "offloading", False):
        offloading = {"offloading": True, "offload_only_non_sliding": cache.only_non_sliding}
    if isinstance(cache, StaticCache):
        length = static_length(cache)
        window: Any = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        if all(cache.is_sliding) and (kinds != {"sliding_attention"} or window > length):
            raise ValueError(
                f"Cannot make a StaticCache for {name} ({config.model_type}): all layers of the hub have a sliding "
                "window, and so its cache does not tell how many tokens it is for. Use a dynamic cache."
            )
        return StaticCache(config=config, max_cache_len=length, **offloading)
    if isinstance(cache, QuantizedCache):
        try:
            return _quantized_like(cache, config)
        except ValueError as error:  # transformers has no quantised layers with windows or linear attention
            raise ValueError(f"Cannot make a QuantizedCache for {name} ({config.model_type}): {error}") from error
    if type(cache) is DynamicCache:
        own = DynamicCache(config=config, **offloading)
        if getattr(cache, "layer_class_to_replicate", None) is not None:
            # `DynamicCache()`: the hub's layers have no windows here, and its masks would be made for the first
            # sliding layer found. Plain layers keep all tokens; the expert's masks keep its window.
            own.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in own.layers]
        if _ROLLS_BACK.get() or any(getattr(layer, "record_past", False) for layer in cache.layers):
            own.activate_past_recording()
        return own
    raise ValueError(
        f"Cannot make a {type(cache).__name__} for {name}: stitched models take DynamicCache, StaticCache "
        "and QuantizedCache."
    )


def _quantized_like(cache: QuantizedCache, config: Any) -> QuantizedCache:
    layer = cache.layers[0]
    backends = {"QuantoQuantizedLayer": "quanto", "HQQQuantizedLayer": "hqq", "Fp8QuantizedLayer": "fp8"}
    options = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
    backend = backends[type(layer).__name__]
    kwargs = {} if backend == "fp8" else {option: getattr(layer, option) for option in options}
    return QuantizedCache(backend=backend, config=config, **kwargs)
