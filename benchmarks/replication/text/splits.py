"""Held-out text that is really new: splits by name, and no near duplicates or long verbatim stretches across them."""

import hashlib
from collections.abc import Iterable, Sequence

from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from .documents import SPLITS, words


STRETCH = 32  # words and signs in a row, verbatim, that a held-out document may not share with training data
LIKENESS = 0.5  # of two documents' shingles, the share in common (Jaccard, estimated) that makes them near duplicates


def split_of(name: str, test: int, validation: int) -> str:
    """The split of a file or message, from its name alone: `test` and `validation` are percentages."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "test" if place < test else "validation" if place < test + validation else "train"


def unique(texts: Sequence[str]) -> list[int]:
    """Where each different text first is, spaces aside."""
    seen: dict[str, int] = {}
    for place, text in enumerate(texts):
        seen.setdefault(" ".join(text.split()), place)
    return list(seen.values())


class NearDuplicates:
    """Texts that were added, and whether another one is much like one of them.

    Documents are compared by shingles of five words, messages by shingles of five letters: they are only a few words
    long, and "Delete pages" is a near duplicate of "Delete page".
    """

    def __init__(self, letters: bool = False, likeness: float = LIKENESS) -> None:
        self.letters, self.index = letters, MinHashLSH(threshold=likeness, num_perm=64)
        self.likeness, self.hashes = likeness, {}

    def _hash(self, text: str) -> MinHash:
        parts = " ".join(words(text.lower())) if self.letters else words(text)
        joined = "" if self.letters else " "
        shingles = {joined.join(parts[i : i + 5]) for i in range(max(1, len(parts) - 4))}
        hashed = MinHash(num_perm=64, seed=1)
        hashed.update_batch([shingle.encode() for shingle in sorted(shingles)])
        return hashed

    def add(self, text: str) -> None:
        name = len(self.hashes)
        self.hashes[name] = self._hash(text)
        self.index.insert(name, self.hashes[name], check_duplication=False)

    def has_like(self, text: str) -> bool:
        hashed = self._hash(text)
        return any(hashed.jaccard(self.hashes[name]) >= self.likeness for name in self.index.query(hashed))


class Stretches:
    """All stretches of `length` words and signs of the texts that were added."""

    def __init__(self, length: int = STRETCH) -> None:
        self.length, self.found = length, set()

    def of(self, text: str) -> Iterable[int]:
        parts = words(text)
        for start in range(len(parts) - self.length + 1):
            yield hash(tuple(parts[start : start + self.length]))

    def add(self, text: str) -> None:
        self.found.update(self.of(text))

    def shares(self, text: str) -> bool:
        return any(stretch in self.found for stretch in self.of(text))


def keep_new(texts: dict[str, Sequence[str]], desc: str, letters: bool = False) -> dict[str, list[int]]:
    """Of each split's texts, the places of those that nothing in the splits before it is like.

    Training texts are all kept, once each. A test text is dropped if it is a near duplicate of a training or
    validation text or shares a verbatim stretch with one.
    """
    near, stretches = NearDuplicates(letters), Stretches()
    kept = {}
    for split in SPLITS:
        places = unique(texts[split])
        bar = tqdm(places, desc=f"{desc}, {split}", unit="text", leave=False)
        kept[split] = [
            place
            for place in bar
            if split == "train" or not (stretches.shares(texts[split][place]) or near.has_like(texts[split][place]))
        ]
        if split != SPLITS[-1]:
            for place in tqdm(kept[split], desc=f"{desc}, index", unit="text", leave=False):
                near.add(texts[split][place])
                stretches.add(texts[split][place])
    return kept


def found_in(strings: Iterable[str], text: str) -> set[str]:
    """Those of `strings` that are somewhere in `text`, to the letter; one pass, however many there are."""
    strings = set(strings)
    tail = min(16, min(map(len, strings), default=0))
    if not tail:
        return strings & {""}
    by_tail: dict[str, list[str]] = {}
    for string in strings:
        by_tail.setdefault(string[-tail:], []).append(string)
    found = set()
    for end in tqdm(
        range(tail, len(text) + 1), desc="look for test strings", unit_scale=True, mininterval=1, leave=False
    ):
        for string in by_tail.get(text[end - tail : end], ()):
            if text.endswith(string, 0, end):
                found.add(string)
    return found
