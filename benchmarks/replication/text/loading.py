"""The corpora, made once from the pinned sources and kept: `load_corpora(cache)`."""

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .building import build
from .corpora import ByKind, Corpora, Sizes
from .documents import Document, Item
from .sources import SOURCES, download


FULL_SIZES = Sizes()


def load_corpora(cache: Path, sizes: Sizes = FULL_SIZES) -> Corpora:
    """The corpora from `cache`, or made anew: downloaded into `cache`/sources, cut, split and kept.

    The kept file depends on the sources, on `sizes` and on the code that makes it: a change of any makes another file.
    """
    key = corpora_key(sizes)
    path = cache / f"corpora-{key}.json.gz"
    if not path.exists():
        corpora = build(download(cache / "sources"), sizes)
        unfinished = path.with_suffix(".unfinished")
        with gzip.open(unfinished, "wt", compresslevel=3, encoding="utf-8") as file:
            json.dump(asdict(corpora), file, ensure_ascii=False)
        unfinished.replace(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return _from_json(json.load(file), key)


def corpora_key(sizes: Sizes) -> str:
    """A name for what the corpora come from: the sources, `sizes`, and the code."""
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
