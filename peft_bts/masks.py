"""The attention mask that an expert gets, when generate() has already made the hub's.

Mostly a mask is the tokenizer's: (B, tokens so far), 1 for tokens and 0 for padding; every backbone makes its own
masks from it. For static caches, generate() makes them in advance, from the hub's config: (B, 1, queries, keys), or
a dict of those by kind of layer. An expert whose layers see as the hub's do can use them. Any other needs the
padding back: the last query sees every key so far but padding, so its row of the full-attention mask is just that.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor


Mask = Union[Tensor, dict[str, Optional[Tensor]], None]

# Prepared masks, and the padding recovered from them, are as long as a static cache. Most backbones expect the padding
# of the tokens so far; these build their position bias from it, for all keys.
_MASK_OF_ALL_KEYS = ("bloom",)


def check_mask(mask: Mask, hub: Any, expert: Any, name: str) -> None:
    """Raise `ValueError` if expert `name` cannot be given a mask that was made for the hub. Arguments are configs."""
    if _is_prepared(mask) and _view(hub) != _view(expert) and not _has_full_attention(mask, hub):
        raise ValueError(
            f"The attention mask was prepared for the hub ({hub.model_type}), all of whose layers have a sliding "
            f"window, so what expert {name!r} ({expert.model_type}) may see cannot be told from it. This happens with "
            "static caches and hand-made 4D masks; use a dynamic cache and a 2D mask."
        )


def expert_mask(mask: Mask, hub: Any, expert: Any, past: Optional[int], queries: int) -> Mask:
    """The mask to hand to an expert's backbone.

    Args:
        mask: The mask in the hub's call.
        hub, expert: Their configs.
        past: Tokens in the expert's cache; `None` if that cannot be known (while compiling with a static cache).
        queries: Tokens in this call.
    """
    if mask is None or (_is_prepared(mask) and _view(hub) == _view(expert)):
        return mask
    if _is_prepared(mask):
        full = mask["full_attention"] if isinstance(mask, dict) else mask
        if full is None:  # nothing is masked but the future
            return None
        last_query = full[:, 0, -1, :]
        mask = (last_query if last_query.dtype == torch.bool else last_query >= 0).long()
    if past is not None and mask.shape[-1] > past + queries and expert.model_type not in _MASK_OF_ALL_KEYS:
        mask = mask[:, : past + queries]
    return mask


def _is_prepared(mask: Mask) -> bool:
    return isinstance(mask, dict) or (mask is not None and len(mask.shape) == 4)


def _has_full_attention(mask: Mask, config: Any) -> bool:
    if isinstance(mask, dict):
        return "full_attention" in mask
    return not isinstance(mask, Tensor) or getattr(config, "sliding_window", None) is None


def _view(config: Any) -> tuple:
    """What decides the form of prepared masks: the kinds of layers, their windows, and the attention kernel."""
    kinds = getattr(config, "layer_types", None)
    return (
        config.model_type,
        None if kinds is None else frozenset(kinds),
        getattr(config, "sliding_window", None),
        getattr(config, "attention_chunk_size", None),
        config._attn_implementation,
    )
