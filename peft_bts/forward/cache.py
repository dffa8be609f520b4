"""One transformers `Cache` for all models.

`generate()` knows one cache, and reorders, crops, repeats, resets and returns it. So the experts' cache layers are
appended to the hub's `cache.layers`, once, behind the hub's own: whatever generate does to the cache, it does to
every model. The experts meanwhile see caches of their own, which hold the very same layer objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from transformers import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .expert import Expert, cached_tokens
from .thread_local import PerThread


# Attributes of a joined cache, by expert name: the experts' own caches, and which experts they were made for.
_JOINED, _MADE_FOR = "_stitched_caches", "_stitched_experts"

# The same, where experts may be dropped: who has seen which tokens (dropping.py).
ROSTER = "_stitched_roster"


# Whether tokens will be taken back from the caches made now, as drafts are. transformers tells the hub's layers before
# an expert's exist, and a hub's layers without windows do not note it.
_ROLLS_BACK = PerThread()


@contextmanager
def caches_roll_back() -> Iterator[None]:
    """Have caches that are made for experts meanwhile, in this thread, keep what a rollback needs."""
    before = _ROLLS_BACK.get()
    _ROLLS_BACK.set(True)
    try:
        yield
    finally:
        _ROLLS_BACK.set(before)


def find_cache(args: tuple, kwargs: dict[str, Any]) -> Optional[Cache]:
    """The cache among a decoder layer's arguments. By type: gpt2 passes it by position, others by several names."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    return None


def check_cache(cache: Cache, experts: dict[str, Expert]) -> None:
    """Raise `ValueError` if what the cache holds cannot be continued with these experts.

    Called before anything is computed, so that a refused cache is left as it was.
    """
    joined: Optional[dict[str, Cache]] = getattr(cache, _JOINED, None)
    if joined is None:
        held = cached_tokens(cache)
        if held:
            raise ValueError(
                f"The cache holds {held} tokens of the hub alone: it was filled while the adapter was "
                "disabled, or by another model, and has no expert states. Start with an empty cache."
            )
        return
    if getattr(cache, _MADE_FOR) != {name: expert.key for name, expert in experts.items()}:
        raise ValueError(
            f"The cache was filled with the experts {sorted(joined)}; now {sorted(experts)} are active, or "
            "other models of these names. Start with an empty cache."
        )
    held, roster = cached_tokens(cache), getattr(cache, ROSTER, None)
    for name, own in joined.items():
        theirs = cached_tokens(own) if roster is None else roster.seen
        if None not in (held, theirs) and held != theirs:
            raise ValueError(
                f"The cache holds {held} tokens of the hub but {theirs} of expert {name!r}: it was used while the "
                "adapter was disabled. Start with an empty cache."
            )


def join_caches(cache: Cache, hub_layers: int, experts: dict[str, Expert]) -> dict[str, Cache]:
    """Return every expert's own cache, appending its layers to the hub's cache if that was not done yet.

    Args:
        cache: The cache of the hub's call.
        hub_layers: Number of the hub's decoder layers.
        experts: The experts to run, by name.

    Raises:
        ValueError: For a kind of cache that cannot be made for an expert.
    """
    joined = getattr(cache, _JOINED, None)
    if joined is not None:
        return joined
    joined = {name: cache_like(cache, expert.config, f"expert {name!r}") for name, expert in experts.items()}
    for own in joined.values():
        if own.offloading and own.only_non_sliding and all(own.is_sliding):
            own.offloading = False  # nothing to offload, which transformers takes for an error
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        # DynamicCache() makes layers as they come; the hub's must all be there before the experts' are appended.
        while len(cache.layers) < hub_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    for own in joined.values():
        cache.layers.extend(own.layers)
    setattr(cache, _JOINED, joined)
    setattr(cache, _MADE_FOR, {name: expert.key for name, expert in experts.items()})
    return joined


def is_plain(cache: Cache) -> bool:
    """Whether rows can be taken out of a cache and put together: it has keys and values, here, and nothing else."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return not getattr(cache, "offloading", False) and all(type(layer) in plain for layer in cache.layers)


def static_length(cache: StaticCache) -> int:
    """How many tokens a static cache can hold (its layers with a window hold fewer)."""
    return max(layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len"))


def cache_like(cache: Cache, config: Any, name: str) -> Cache:
    """An empty cache of the same kind, for a model of this config.

    Raises:
        ValueError: For a kind that cannot be made; `name` says which model it is for.
    """
    offloading = {}
    if getattr(cache, "offloading", False):
        offloading = {"offloading": True, "offload_only_non_sliding": cache.only_non_sliding}
    if isinstance(cache, StaticCache):
        length = static_length(cache)
        window = getattr(config, "sliding_window", None)
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
