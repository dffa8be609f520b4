"""From forwards to sequences: what a trace keeps of each forward, and how forwards join that continue one another.

Forwards that continue one cache make a batch. Columns are counted as in the padded batch, from its first token. What
is computed again from some column on (a rejected draft, a cropped cache) replaces what was there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from ..forward.cache import cached_tokens


@dataclass(frozen=True, order=True)
class TracedStitch:
    """A stitch: the 0-based hub layer that it sits behind, its kind, and whose gates it has, in the columns' order.

    The gates of an output mixture stand behind all layers, with the kind `"output_mixture"`.
    """

    layer: int
    kind: str
    models: tuple[str, ...]


@dataclass
class GateSequence:
    """One sequence of T tokens, without its padding.

    Attributes:
        domain: The trace's label when the sequence began, or `None`.
        token_ids: T ids; `None` for tokens that came as `inputs_embeds`.
        generated: T flags, whether `generate()` made the token (its last token is never fed back: it has no gates).
        gates: For every stitch of the trace, (T, models), float32 on the CPU; NaN where a model was left out.
    """

    domain: Optional[str]
    token_ids: list[Optional[int]]
    generated: list[bool]
    gates: list[Tensor]

    def __len__(self) -> int:
        return len(self.generated)


class Generation:
    """A `generate()` call.

    Attributes:
        ends: Ids of tokens that end a sequence.
        uncached: The batch of a call with `use_cache=False`, whose every forward computes all tokens again.
    """

    def __init__(self, prompt: int, ends: list[int]) -> None:
        self.ends = ends
        self.uncached: Optional[Batch] = None
        self._prompt = prompt
        self._prompts: dict[int, int] = {}
        self._caches: list[tuple[Any, Batch]] = []  # held until the end, to be asked then

    def prompt_of(self, batch: Batch, cache: Any, columns: int) -> int:
        """Return where the batch's prompt ends. A second batch has negative prompts, as long as its first call."""
        if id(batch) not in self._prompts:
            self._prompts[id(batch)] = columns if self._prompts else self._prompt
            if cache is None:
                self.uncached = batch
            else:
                self._caches.append((cache, batch))
        return self._prompts[id(batch)]

    def drop_rejected(self) -> None:
        """Drafts rejected in the last step: no later call overwrites them, but the cache has lost them."""
        for cache, batch in self._caches:
            held = cached_tokens(cache)
            if held:
                batch.cut(held)
        self._caches.clear()


@dataclass
class Chunk:
    """One forward: `columns` tokens of every row, the first in column `start` of the padded sequences."""

    start: int
    columns: int
    token_ids: Optional[Tensor]  # (B, columns)
    text: Optional[Tensor]  # (B, columns), false for padding
    gates: dict[tuple[int, str], tuple[tuple[str, ...], Tensor]]  # by stitch: names, (models, B, columns)
    generation: Optional[Generation]
    prompt: Optional[int]  # the column where generated tokens start

    def cut(self, columns: int) -> None:
        self.columns = columns
        self.token_ids = None if self.token_ids is None else self.token_ids[:, :columns]
        self.text = None if self.text is None else self.text[:, :columns]
        self.gates = {key: (names, gates[..., :columns]) for key, (names, gates) in self.gates.items()}

    def generated(self) -> Tensor:
        places = torch.arange(self.start, self.start + self.columns)
        return torch.zeros_like(places, dtype=torch.bool) if self.prompt is None else places >= self.prompt


@dataclass
class Batch:
    """Forwards that continue one another."""

    domain: Optional[str]
    rows: int
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.chunks[-1].start + self.chunks[-1].columns if self.chunks else 0

    def cut(self, end: int) -> None:
        """Forget the tokens from column `end` on: they are computed anew, or were taken back."""
        while self.chunks and self.chunks[-1].start >= end:
            self.chunks.pop()
        if self.end > end:
            self.chunks[-1].cut(end - self.chunks[-1].start)

    def sequences(self, stitches: list[TracedStitch]) -> Iterator[GateSequence]:
        if not self.chunks:
            return
        generated = torch.cat([chunk.generated() for chunk in self.chunks])
        token_ids = torch.cat([_on_cpu(chunk.token_ids, (self.rows, chunk.columns), -1) for chunk in self.chunks], 1)
        kept = torch.cat([_on_cpu(chunk.text, (self.rows, chunk.columns), 1).bool() for chunk in self.chunks], 1)
        kept &= ~self._finished(token_ids, generated)
        gates = [torch.cat([self._gates(chunk, stitch) for chunk in self.chunks], 1) for stitch in stitches]
        for row in range(self.rows):
            keep = kept[row]
            yield GateSequence(
                self.domain,
                [None if token < 0 else token for token in token_ids[row][keep].tolist()],
                generated[keep].tolist(),
                [gate[row][keep] for gate in gates],
            )

    def _gates(self, chunk: Chunk, stitch: TracedStitch) -> Tensor:
        """(B, columns, models), NaN for models that took no part."""
        all_gates = torch.full((self.rows, chunk.columns, len(stitch.models)), torch.nan)
        names, gates = chunk.gates.get((stitch.layer, stitch.kind), ((), ()))
        for name, gate in zip(names, gates):
            all_gates[..., stitch.models.index(name)] = gate.cpu()
        return all_gates

    def _finished(self, token_ids: Tensor, generated: Tensor) -> Tensor:
        """Return where a row had ended and only waited for the rest of the batch: (B, T)."""
        finished = torch.zeros_like(token_ids, dtype=torch.bool)
        starts = torch.cat([torch.full((chunk.columns,), i) for i, chunk in enumerate(self.chunks)])
        for generation in {id(chunk.generation): chunk.generation for chunk in self.chunks}.values():
            if generation is not None:
                own = torch.tensor([chunk.generation is generation for chunk in self.chunks])[starts] & generated
                is_end = torch.isin(token_ids[:, own], torch.tensor(generation.ends, dtype=token_ids.dtype))
                finished[:, own] = is_end.cumsum(1) - is_end.long() > 0
        return finished


def _on_cpu(tensor: Optional[Tensor], shape: tuple[int, int], default: int) -> Tensor:
    return torch.full(shape, default) if tensor is None else tensor.cpu()
