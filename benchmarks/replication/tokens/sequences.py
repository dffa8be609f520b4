"""Sequences to be scored: documents, and items behind their examples, in flat arrays."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ..text.documents import GIVEN, Document, Item
from ..text.tasks import EXAMPLES
from .blocks import LENGTH
from .tokenizer import encode, token_bytes


@dataclass
class Sequences:
    """Sequences of tokens, one after another in flat arrays; sequence i is at places starts[i] : starts[i + 1].

    tokens: (total,) int64. kinds: (total,) int16, indices into `names`; the kind -1 is not scored: the END that opens
    a sequence, and what is given. bytes: (total,) uint8. prompt: (N,) how many tokens a method may look at that
    decides once for a whole sequence.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    bytes: np.ndarray
    starts: np.ndarray
    prompt: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def scored(self) -> np.ndarray:
        return self.kinds >= 0

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """All sequences, those of like lengths together: their numbers (B,), and tokens (B, T), zeros behind them."""
        lengths = np.diff(self.starts)
        for rows in np.array_split(lengths.argsort(kind="stable"), -(-len(lengths) // size)):
            tokens = torch.zeros(len(rows), int(lengths[rows].max()), dtype=torch.long)
            for place, row in enumerate(rows):
                tokens[place, : lengths[row]] = torch.from_numpy(self.tokens[self.starts[row] : self.starts[row + 1]])
            yield rows, tokens

    def of(self, values: np.ndarray) -> list[np.ndarray]:
        """Values (..., total) in pieces, one for each sequence."""
        return np.split(values, self.starts[1:-1], axis=-1)

    def sums(self, values: np.ndarray, kind: str | None = None) -> np.ndarray:
        """Values (..., total) added up within each sequence, over scored tokens, or those of one kind: (..., N)."""
        chosen = self.scored if kind is None else self.kinds == self.names.index(kind)
        return np.add.reduceat(np.where(chosen, values, 0).astype(np.float64), self.starts[:-1], axis=-1)


def _sequences(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[list[tuple[str, list[int]]], int]]) -> Sequences:
    """From rows of (stretches of tokens by kind, length of the prompt)."""
    names = sorted({kind for parts, _ in rows for kind, _ in parts} - {GIVEN})
    number = {GIVEN: -1, **{name: place for place, name in enumerate(names)}}
    tokens = [token for parts, _ in rows for _, ids in parts for token in ids]
    kinds = [number[kind] for parts, _ in rows for kind, ids in parts for _ in ids]
    lengths = [sum(len(ids) for _, ids in parts) for parts, _ in rows]
    tokens = np.array(tokens, dtype=np.int64)
    return Sequences(
        tokens, np.array(kinds, dtype=np.int16), token_bytes(tokenizer)[tokens], np.cumsum([0, *lengths]),
        np.array([prompt for _, prompt in rows]), names,
    )  # fmt: skip


def document_sequences(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], length: int = LENGTH
) -> Sequences:
    """Documents, each opened by END and cut after `length` tokens.

    The prompt is what is given at the start; of a document where nothing is given, its first quarter.
    """
    rows = []
    for document in documents:
        parts = [(GIVEN, [tokenizer.eos_token_id]), *encode(tokenizer, document.parts)]
        total = min(length, sum(len(ids) for _, ids in parts))
        given = 1 + (len(parts[1][1]) if parts[1][0] == GIVEN else 0)
        rows.append((_cut(parts, length), given if given > 1 else max(1, total // 4)))
    return _sequences(tokenizer, rows)


def _cut(parts: list[tuple[str, list[int]]], length: int) -> list[tuple[str, list[int]]]:
    kept = []
    for kind, ids in parts:
        kept.append((kind, ids[:length]))
        length -= len(ids[:length])
    return [(kind, ids) for kind, ids in kept if ids]


def item_sequences(
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    examples: Sequence[Item] = (),
    seed: int = 0,
    length: int = LENGTH,
) -> Sequences:
    """Items; what is scored is the answer, with the END behind it where the text ends there.

    Args:
        examples: Items of which four are shown, solved, before each item. They are drawn for each item, but are the
            same for all methods; where no draw of 20 fits `length` tokens, they are the four shortest, or as many of
            these as do fit. Without any, items are asked alone.

    Raises:
        ValueError: If not even the shortest example fits.
    """
    rng, rows, end = random.Random(seed), [], [tokenizer.eos_token_id]

    def encoded(item: Item) -> tuple[list[int], list[int]]:
        (_, asked), (_, said) = encode(tokenizer, [("", item.prompt), ("", item.answer)])
        return end + asked, said

    solved = sorted(([*asked, *said] for asked, said in map(encoded, examples)), key=len)
    for item in items:
        asked, said = encoded(item)
        said = said + end if item.ends else said
        shortest = [solved[:count] for count in range(EXAMPLES, 0, -1)]
        draws = [*(rng.sample(solved, EXAMPLES) for _ in range(20)), *shortest] if solved else [[]]
        given = ([token for one in shown for token in one] + asked for shown in draws)
        fitting = next((tokens for tokens in given if len(tokens) + len(said) <= length), None)
        if fitting is None:
            raise ValueError(f"with an example, this item takes more than {length} tokens: {item}")
        rows.append(([(GIVEN, fitting), ("answer", said)], len(fitting)))
    return _sequences(tokenizer, rows)
