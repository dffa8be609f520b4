"""The attention mask that an expert gets, when generate() has already made the hub's.

Mostly a mask is the tokenizer's: (B, tokens so far), 1 for tokens and 0 for padding; every backbone makes its own
masks from it. For static caches, generate() makes them in advance, from the hub's config: (B, 1, queries, keys), or
a dict of those by kind of layer. An expert whose layers see as the hub's do can use them. Any other needs the
padding back: the last query sees every key so far but padding, so its row of the full-attention mask is just that.
"""

from __future__ import annotations

from typing import Any, Optional, TypeGuard, Union

import torch
from torch import Tensor


Mask = Union[Tensor, dict[str, Optional[Tensor]], None]

# Prepared masks, and the padding recovered from them, are as long as a static cache. Most backbones expect the padding
# of the tokens so far; these build their position bias from it, for all keys.
_MASK_OF_ALL_KEYS = ("bloom",)


def check_mask(mask: Mask, hub: Any, expert: Any, name: str) -> None:
    """Raise `ValueError` if expert `name` cannot be given a mask that was made for the hub. Arguments are configs."""
    if not is_prepared(mask) or view_of(hub) == view_of(expert):
        return
    models = f"the hub ({hub.model_type}), and expert {name!r} ({expert.model_type})"
    if not _has_full_attention(mask, hub):
        raise ValueError(
            f"The attention mask was prepared for {models} cannot tell from it what it may see: all layers of the hub "
            "have a sliding window. This happens with static caches; use a dynamic one, and a 2D mask."
        )
    if not torch.compiler.is_compiling() and not is_causal_with_padding(mask):
        raise ValueError(
            f"The attention mask was prepared for {models}, whose layers see differently, could only be given the "
            "padding in it; but it masks more than the future and padding on the left (padding on the right cannot be "
            "told from it). Use a 2D mask, or experts of the hub's architecture."
        )


def expert_mask(mask: Mask, hub: Any, expert: Any, past: Optional[int], queries: int) -> Mask:
    """The mask to hand to an expert's backbone.

    Args:
        mask: The mask in the hub's call.
        hub, expert: Their configs.
        past: Tokens in the expert's cache; `None` if that cannot be known (while compiling with a static cache).
        queries: Tokens in this call.
    """
    if mask is None or (is_prepared(mask) and view_of(hub) == view_of(expert)):
        return mask
    if _is_padding(mask):
        padding = mask
    else:
        full = _full(mask)
        if full is None:  # nothing is masked but the future
            return None
        padding = _visible(full)[:, -1].long()
    if past is not None and padding.shape[-1] > past + queries and expert.model_type not in _MASK_OF_ALL_KEYS:
        padding = padding[:, : past + queries]
    return padding


def is_text(mask: Mask, hub: Any, past: int, queries: int) -> Optional[Tensor]:
    """Return which of this call's tokens are no padding, (B, queries); `None` where the mask does not tell.

    Args:
        mask, hub: The mask in the hub's call, and the hub's config.
        past: Tokens in the cache before the call.
        queries: Tokens in this call.
    """
    if _is_padding(mask):
        padding = mask
    else:
        full = _full(mask) if _has_full_attention(mask, hub) else None
        if full is None:
            return None
        padding = _visible(full)[:, -1]
    if padding.dim() != 2 or padding.shape[1] < past + queries:
        return None
    return padding[:, past : past + queries].bool()


def _is_padding(mask: Mask) -> TypeGuard[Tensor]:
    """Return whether a mask is the tokenizer's: (B, tokens so far)."""
    return isinstance(mask, Tensor) and mask.dim() != 4


def is_prepared(mask: Mask) -> bool:
    """Return whether generate(), or a user, has made it in advance: 4D, or one of each kind of layers."""
    return mask is not None and not _is_padding(mask)


def _has_full_attention(mask: Mask, config: Any) -> bool:
    if isinstance(mask, dict):
        return "full_attention" in mask
    return not isinstance(mask, Tensor) or getattr(config, "sliding_window", None) is None


def _full(mask: Mask) -> Optional[Tensor]:
    return mask["full_attention"] if isinstance(mask, dict) else mask


def _visible(full: Tensor) -> Tensor:
    """(B, 1, queries, keys) of either form, boolean or added to the logits, to (B, queries, keys), true where seen."""
    return full[:, 0] if full.dtype == torch.bool else full[:, 0] >= 0


def is_causal_with_padding(mask: Mask) -> bool:
    """Return whether every query sees just the keys up to itself that the last query sees too."""
    full = _full(mask)
    if full is None or full.shape[-2] == 1:
        return True
    visible = _visible(full)
    padding = visible[:, -1]
    queries, keys = visible.shape[-2:]
    # The last query sees itself: its place is that of the last key it sees.
    last = keys - 1 - padding.flip(-1).long().argmax(-1)
    places = last[:, None] + torch.arange(1 - queries, 1, device=last.device)
    causal = torch.arange(keys, device=last.device) <= places[..., None]
    is_text = padding.gather(-1, places.clamp(min=0))
    expected = (visible == (causal & padding[:, None])).all(-1)
    nothing_or_all = ~visible.any(-1) | visible.all(-1)  # what padding sees, in a mask that transformers made
    return bool(torch.where(is_text, expected, nothing_or_all).all())


def view_of(config: Any) -> tuple[Any, ...]:
    """Return what decides the form of prepared masks: the kinds of layers, their windows, and the attention kernel."""
    kinds = getattr(config, "layer_types", None)
    return (
        config.model_type,
        None if kinds is None else frozenset(kinds),
        getattr(config, "sliding_window", None),
        getattr(config, "attention_chunk_size", None),
        config._attn_implementation,
    )
