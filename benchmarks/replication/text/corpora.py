"""What the corpora are: documents and items by split, and how many there are of them."""

from dataclasses import dataclass, field

from .documents import Document


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
