"""Build the corpora, and print the tables of README.md: `python -m benchmarks.replication.text [cache]`."""

import sys
from pathlib import Path

from ..tokens.sequences import document_sequences
from ..tokens.tokenizer import VOCABULARY, train_tokenizer
from .corpora import DOMAINS, MIXED, Corpora
from .documents import SPLITS
from .loading import load_corpora
from .sources import SOURCES
from .tasks import CROSS, TASKS


def table(head: list[str], rows: list[list]) -> str:
    """Markdown; numbers with commas, flush right."""
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    rows = [[f"{cell:,}" if isinstance(cell, int | float) else cell for cell in row] for row in rows]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows]) + "\n"


def megabytes(count: int) -> float:
    return round(count / 1e6, 2)


def tables(corpora: Corpora, sources: Path) -> str:
    """What there is: sources, documents, what was left out, items, mixed documents, and bytes per token."""

    def size(documents: list) -> float:
        return megabytes(sum(len(one.text.encode()) for one in documents))

    def count(kind: str, split: str, what: str) -> str:
        return f"{corpora.counts[kind][split][what]:,}" if split in corpora.counts[kind] else ""

    read = [
        [source.name, source.version, source.licence, source.gives, megabytes((sources / source.file).stat().st_size)]
        for source in SOURCES.values()
    ]
    parts = [[domain, *(corpora.documents[split][domain] for split in SPLITS)] for domain in DOMAINS]
    documents = [[domain, *(cell for part in by for cell in (len(part), size(part)))] for domain, *by in parts]
    left_out = [
        [kind, *(count(kind, split, what) for split in SPLITS for what in ("found", "kept"))]
        for kind in corpora.counts
    ]
    tasks = {**{name: task.title for name, task in TASKS.items()}, CROSS: "word problems in French, numbers in words"}
    items = [
        [name, title, *(len(corpora.items[split][name]) for split in ("examples", "validation", "test"))]
        for name, title in tasks.items()
    ]
    mixed = [[kind, len(corpora.mixed[kind]), size(corpora.mixed[kind])] for kind in MIXED]
    return "\n".join(
        [
            table(["source", "version", "licence", "what is read", "MB"], read),
            table(["domain", *(head for split in SPLITS for head in (split, "MB"))], documents),
            table(["kind", *(f"{split}, {what}" for split in SPLITS for what in ("found", "kept"))], left_out),
            table(["task", "what is asked", "examples", "validation", "test"], items),
            table(["mixed text", "documents", "MB"], mixed),
            table(
                ["vocabulary", *DOMAINS, "documents cut, %"], [vocabulary(corpora, 2**power) for power in (10, 11, 12)]
            ),
        ]
    )


def vocabulary(corpora: Corpora, size: int) -> list:
    """A row: bytes per token of each domain's validation text, and how many documents 256 tokens do not hold."""
    tokenizer = train_tokenizer(corpora.documents["train"], size)
    row, cut = [f"{size}{' (taken)' if size == VOCABULARY else ''}"], []
    for domain in DOMAINS:
        whole = document_sequences(tokenizer, corpora.documents["validation"][domain], length=10**6)
        row.append(round(float(whole.bytes.sum() / (len(whole.tokens) - len(whole))), 2))
        cut += [len(tokens) > 256 for tokens in whole.of(whole.tokens)]
    return [*row, round(100 * sum(cut) / len(cut), 1)]


if __name__ == "__main__":
    cache = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/replicate")
    print(tables(load_corpora(cache), cache / "sources"))
