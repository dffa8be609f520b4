"""What the gates of a mixture with evidence must know of a call: which tokens are text, and which follow which.

A cache keeps what later calls go on from (`Memory`), beside the experts' caches: whatever is done to the sequences of
one is done to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import is_causal_with_padding, is_prepared, is_text


_NONE = 2**62  # a place that no token has


@dataclass
class Memory:
    """What sequences go on from.

    Attributes:
        evidence_BM: The evidence for each model up to the last token.
        expected_BMV: Log probabilities that each model has given the token that comes next.
        begun_B: Whether there was a token yet that is no padding.
        forgetting: By which factor the evidence was summed up.
    """

    evidence_BM: Tensor
    expected_BMV: Tensor
    begun_B: Tensor
    forgetting: float

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Memory:
        """The same after a change of the sequences of the batch."""
        tensors = (self.evidence_BM, self.expected_BMV, self.begun_B)
        evidence_BM, expected_BMV, begun_B = map(change, tensors)
        return replace(self, evidence_BM=evidence_BM, expected_BMV=expected_BMV, begun_B=begun_B)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.evidence_BM.nbytes + self.expected_BMV.nbytes + self.begun_B.nbytes


class Following(NamedTuple):
    """How the tokens of a call follow each other.

    Attributes:
        text_BT: Which are no padding.
        told_BT: Which of them follow one of the same text, so that models have predicted them.
        before_BT: The place of the text's token before each one in this call; -1 where it was in an earlier call.
        last_B: The place of the last one; -1 if all are padding.
    """

    text_BT: Tensor
    told_BT: Tensor
    before_BT: Tensor
    last_B: Tensor

    @property
    def next_BT(self) -> Tensor:
        """The place of the next token that is no padding; 0 for the last one."""
        places = torch.arange(self.text_BT.shape[1], device=self.text_BT.device)
        from_BT = torch.where(self.text_BT, places, _NONE).flip(1).cummin(dim=1).values.flip(1)
        next_BT = F.pad(from_BT[:, 1:], (0, 1), value=_NONE)
        return torch.where(next_BT < _NONE, next_BT, 0)


def follow(call: Mapping[str, Any], hub_config: Any, past: Optional[int], memory: Optional[Memory]) -> Following:
    """Find out how the tokens of a causal LM's call follow each other.

    Padding is known from the mask; texts that are packed into one row from 2D position ids.

    Args:
        call: The arguments by name.
        hub_config: The hub's text config.
        past: Tokens in the cache before the call; `None` where that is not known.
        memory: Of the tokens before, if there were any.

    Raises:
        ValueError: If the mask does not tell which tokens are padding.
    """
    tokens_BT, positions = call["input_ids"], call.get("position_ids")
    text_BT = _text(call.get("attention_mask"), hub_config, past, tokens_BT)
    places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    up_to_BT = torch.where(text_BT, places, -1).cummax(dim=1).values
    before_BT = F.pad(up_to_BT[:, :-1], (1, 0), value=-1)
    told_BT = before_BT >= 0
    if memory is not None:
        told_BT = told_BT | memory.begun_B.to(told_BT.device)[:, None]
    if isinstance(positions, Tensor) and positions.dim() == 2:
        positions = positions.to(tokens_BT.device).expand(tokens_BT.shape)
        goes_on_BT = positions == positions.gather(1, before_BT.clamp(min=0)) + 1
        told_BT = told_BT & (goes_on_BT | (before_BT < 0))
    return Following(text_BT, text_BT & told_BT, before_BT, up_to_BT[:, -1])


def _text(mask: Any, hub_config: Any, past: Optional[int], tokens_BT: Tensor) -> Tensor:
    tokens = tokens_BT.shape[1]
    if mask is None or (past is None and is_prepared(mask)):  # the latter in compiled steps of one token
        return torch.ones_like(tokens_BT, dtype=torch.bool)
    text_BT: Optional[Tensor] = None
    if past is None:
        text_BT = mask[:, -tokens:].bool()
    elif not is_prepared(mask) or torch.compiler.is_compiling() or is_causal_with_padding(mask):
        text_BT = is_text(mask, hub_config, past, tokens)
    if text_BT is None:
        raise ValueError(
            "The output gates go by evidence, and the attention mask does not tell which tokens are padding: it was "
            "prepared for layers with windows only, or masks more than the future and padding. Use a 2D mask, and a "
            "dynamic cache."
        )
    return text_BT.to(tokens_BT.device).expand(tokens_BT.shape)
