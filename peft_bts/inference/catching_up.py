"""What experts that were left out have missed, and how they come to have seen it.

Each expert sees the sequences of a batch in groups: those of which it has seen equally much. A group that is behind
has a list of forwards to make up for, their tokens and what the hub would have told the expert at the time. Groups
split where an expert is called for some of their sequences only, and become one again when they are level.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..forward.cache import is_plain


# Over how many tokens gates are averaged. Measured (benchmarks/dropping.py): one token is not enough to tell what
# comes next, and the prompt as a whole misses a change of domain. Sixteen were too slow to notice one in an earlier
# study, with gates of stitches; in the present one, with output gates, they do as well as four.
RECENT = 4


@dataclass
class RowGroup:
    """Sequences for which an expert has seen equally much."""

    rows: Tensor  # which sequences of the batch, (R,)
    cache: Cache  # the expert's, of these rows
    done: int  # how many tokens it holds

    def split(self, wanted: Tensor) -> list[RowGroup]:
        """Groups of the rows that `wanted` (B,) marks, and of the others; one group where that cannot be done."""
        mine = wanted[self.rows]
        if mine.all() or not mine.any() or not is_plain(self.cache):
            return [self]
        return [RowGroup(self.rows[part], _rows_of(self.cache, part), self.done) for part in (mine, ~mine)]


@dataclass
class MissedForward:
    """One forward: what an expert that took no part in it needs to make up for it. Callers may reuse their tensors."""

    start: int  # tokens that the hub's cache held before
    tokens: dict[str, Tensor]  # arguments of the hub's backbone with an entry per token, (B or 1, T, ...)
    hub: dict[int, Tensor]  # the hub's states at its Hub-into-Experts stitches, (B, T, D) by layer

    def with_places(self) -> dict[str, Tensor]:
        """The tokens with their positions, which a backbone that is given none counts from the first of the cache."""
        given = next(iter(self.tokens.values()))
        places = torch.arange(self.start, self.start + given.shape[1], device=given.device)
        return {"position_ids": places[None], **self.tokens}


class CatchUpState:
    """Who has seen what of the sequences in a cache. Belongs to the cache.

    Attributes:
        seen: Tokens of a sequence so far.
        groups: By expert.
        missed: Forwards that some group has not seen yet, the oldest first.
        recent: Gates of the experts, (B, up to RECENT, N), in the order of `names`; NaN for padding.
        adapter: Whose stitches the sequences were continued with.
    """

    def __init__(self, caches: dict[str, Cache], adapter: str, batch: int, seen: int) -> None:
        self.names, self.adapter = sorted(caches), adapter
        self.seen = seen
        every = torch.arange(batch)
        self.groups = {name: [RowGroup(every, caches[name], self.seen)] for name in self.names}
        self.missed: list[MissedForward] = []
        self.recent: Optional[Tensor] = None

    @property
    def batch(self) -> int:
        return sum(len(group.rows) for group in self.groups[self.names[0]])

    def mean_gates(self) -> Optional[Tensor]:
        """The experts' gates over the last tokens, (B, N) in the order of `names`; 0 where all of them are padding."""
        return None if self.recent is None else self.recent.nanmean(dim=1).nan_to_num()

    def since(self, group: RowGroup) -> list[MissedForward]:
        """The forwards that a group has not seen yet."""
        return [call for call in self.missed if call.start >= group.done]

    def note(self, gates_BTN: Tensor, text_BT: Optional[Tensor]) -> None:
        """Remember the gates of new tokens, of which some may be padding."""
        if text_BT is not None:
            gates_BTN = gates_BTN.masked_fill(~text_BT.to(gates_BTN.device)[..., None], torch.nan)
        gates_BTN = gates_BTN[:, -RECENT:].detach().float().cpu()
        before = () if self.recent is None else (self.recent,)
        self.recent = torch.cat([*before, gates_BTN], dim=1)[:, -RECENT:]

    def close(self, ran: list[RowGroup]) -> None:
        """After a forward: groups that are level again become one, and what all have seen is forgotten."""
        for group in ran:
            group.done = self.seen
        for name, groups in self.groups.items():
            level = [group for group in groups if group.done == self.seen]
            if len(level) > 1 and all(is_plain(group.cache) for group in level):
                behind = [group for group in groups if group.done < self.seen]
                rows = torch.cat([group.rows for group in level])
                joined = RowGroup(rows, _joined_rows([group.cache for group in level]), self.seen)
                self.groups[name] = [joined, *behind]
        least = min(group.done for groups in self.groups.values() for group in groups)
        self.missed = [call for call in self.missed if call.start >= least]


class CatchUpCache(DynamicCache):
    """A `DynamicCache` some of whose experts have tokens to catch up on: its sequences can only be continued.

    The experts' caches are split into groups of rows then, which nothing that is done to all layers would reach.
    """

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("crop")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("reorder_cache")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("batch_select_indices")

    def reset(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("reset")

    def _refuse(self, change: str) -> NoReturn:
        raise ValueError(
            f"{change}() on a cache that was filled while experts could be left out: its sequences can only be "
            "continued. Beam search, drafts and the like need a cache that was filled without `drop_experts`."
        )


def _with_layers(cache: Cache, layers: list[Any]) -> Cache:
    new = copy.copy(cache)
    new.layers = layers
    return new


def _rows_of(cache: Cache, rows: Tensor) -> Cache:
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.batch_select_indices(rows)
    return _with_layers(cache, layers)


def _joined_rows(caches: list[Cache]) -> Cache:
    layers = []
    for parts in zip(*(cache.layers for cache in caches)):
        layer = copy.copy(parts[0])
        layer.keys = torch.cat([part.keys for part in parts])
        layer.values = torch.cat([part.values for part in parts])
        layers.append(layer)
    return _with_layers(caches[0], layers)
