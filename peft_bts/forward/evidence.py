"""What the gates of a mixture with evidence must know of a batch: which tokens follow which, and what came before.

A cache keeps the rest of it between calls (`Memory`), beside the experts' caches: whatever is done to the batch of
one is done to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor


@dataclass
class Memory:
    """What a sequence goes on from.

    Attributes:
        evidence_BM: The evidence for each model up to the last token.
        expected_BMV: Log probabilities that each model has given the token that comes next.
        real_B: Whether the last token was one, not padding.
        seen_B: How many tokens were seen: a tensor, which compiled code counts without being compiled anew.
    """

    evidence_BM: Tensor
    expected_BMV: Tensor
    real_B: Tensor
    seen_B: Tensor

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply what is done to the sequences of a batch."""
        for field in fields(self):
            setattr(self, field.name, change(getattr(self, field.name)))


class Following(NamedTuple):
    """How the tokens of a call follow each other, boolean (B, T).

    Attributes:
        real: Tokens that are no padding.
        told: Tokens that follow one of the same text, so that models have predicted them.
    """

    real: Tensor
    told: Tensor

    @property
    def first(self) -> Tensor:
        """The first tokens of texts."""
        return self.real & ~self.told


def follow(call: Mapping[str, Any], memory: Optional[Memory]) -> Following:
    """Find out how the tokens of a causal LM's call follow each other.

    Padding is known from 2D attention masks, texts that are packed into one row from 2D position ids. Masks of more
    dimensions are taken to leave no token out.

    Args:
        call: The arguments by name.
        memory: Of the tokens before, if there were any.
    """
    tokens_BT = call["input_ids"]
    mask, places = call.get("attention_mask"), call.get("position_ids")
    real = torch.ones_like(tokens_BT, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[:, -tokens_BT.shape[1] :].to(tokens_BT.device).bool().expand_as(real)
    before = torch.zeros_like(real[:, :1]) if memory is None else memory.real_B.to(real.device)[:, None]
    told = real & torch.cat([before, real[:, :-1]], dim=1)
    if isinstance(places, Tensor) and places.dim() == 2:
        adjacent = (places[:, 1:] == places[:, :-1] + 1).to(told.device)
        told = torch.cat([told[:, :1], told[:, 1:] & adjacent], dim=1)
    return Following(real, told)
