"""All text of the study, made once from the pinned sources and kept: `load_corpora(cache)`."""

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .documents import Document, Item
from .sources import SOURCES, download


DOMAINS = ["prose", "python", "javascript", "french", "german", "maths"]
MIXED = ["pages", "catalogues", "docstrings", "switches"]  # tests only

ByKind = dict[str, dict[str, list]]  # [split][domain or task]


@dataclass(frozen=True)
class Sizes:
    """How much is kept for tests and validation, and how much is generated for training."""

    documents: dict = field(
        default_factory=lambda: {"validation": 200, "test": 400}
    )  # of a domain, at least; mixed as test
    items: dict = field(default_factory=lambda: {"examples": 400, "validation": 300, "test": 1000})  # of a task
    problems: int = 100_000  # training documents of maths, four of five sums
    sentences: float = 0.2  # of a language's training documents, those that are generated, with numbers in words
    cross: int = 2000  # training items of the cross task; fewer are the first of them

    def held_out(self, split: str, domain: str) -> int:
        """Documents of a domain: where they are short, there are more of them."""
        return self.documents[split] * {"french": 2, "german": 2, "maths": 5}.get(domain, 1)


@dataclass
class Corpora:
    """Documents by split and domain, items by split and task, mixed documents by kind; all in a fixed order.

    Items have a split "examples" too: questions on training text, to be shown solved before another question.
    `counts` says what was found, and what was left out for being too much like text of another split.
    """

    documents: ByKind
    items: ByKind
    mixed: dict[str, list[Document]]
    counts: dict[str, dict[str, dict[str, int]]]
    key: str = ""  # of the sources, the sizes and the code that it comes from


def load_corpora(cache: Path, sizes: Sizes = Sizes()) -> Corpora:
    """The corpora from `cache`, or made anew: downloaded into `cache`/sources, cut, split and kept.

    The kept file depends on the sources, on `sizes` and on the code that makes it: a change of any makes another file.
    """
    key = _key(sizes)
    path = cache / f"corpora-{key}.json.gz"
    if not path.exists():
        from .building import build  # reads much that is not needed where the file is there

        corpora = build(download(cache / "sources"), sizes)
        unfinished = path.with_suffix(".unfinished")
        with gzip.open(unfinished, "wt", compresslevel=3, encoding="utf-8") as file:
            json.dump(asdict(corpora), file, ensure_ascii=False)
        unfinished.replace(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return _from_json(json.load(file), key)


def _key(sizes: Sizes) -> str:
    total = hashlib.sha256(repr((sizes, SOURCES)).encode())
    for name in ("documents", "pages", "programs", "catalogues", "problems", "splits", "tasks", "building"):
        total.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return total.hexdigest()[:12]


def _from_json(plain: dict, key: str) -> Corpora:
    def document(fields: dict) -> Document:
        return Document(tuple(map(tuple, fields["parts"])), fields["source"])

    def read(by_kind: dict, make: Callable) -> ByKind:
        return {
            split: {kind: list(map(make, found)) for kind, found in part.items()} for split, part in by_kind.items()
        }

    return Corpora(
        read(plain["documents"], document), read(plain["items"], lambda fields: Item(**fields)),
        {kind: list(map(document, found)) for kind, found in plain["mixed"].items()}, plain["counts"], key,
    )  # fmt: skip
