"""What everything is made of: documents, and items that ask for an answer."""

import re
from dataclasses import dataclass


SPLITS = ["train", "validation", "test"]
GIVEN = "given"  # the kind of text that is read, not scored: drawn numbers, say, which nothing could predict


@dataclass(frozen=True)
class Document:
    """Text in stretches of one kind each, (kind, text): a kind is a domain, "english" in a translation, or `GIVEN`."""

    parts: tuple[tuple[str, str], ...]
    source: str = ""  # "django/docs/intro/tutorial01.txt"

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.parts)


@dataclass(frozen=True)
class Item:
    """A question with one right answer, which is what is scored.

    `ends`: a document ends behind the answer, as it does behind a translation, but not behind a name in a program.
    """

    prompt: str
    answer: str
    level: str = ""  # what kind of question it is, where a task has several
    ends: bool = True

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def words(text: str) -> list[str]:
    """Words and single signs, which is what overlaps are counted in."""
    return re.findall(r"\w+|[^\w\s]", text)


def passages(text: str, longest: int = 640, shortest: int = 200) -> list[str]:
    """A text in consecutive pieces of `shortest` to `longest` characters, cut at blank lines, else at line ends.

    A model that reads 256 tokens at a time sees a whole piece. What is left over is dropped: ends of files, and lines
    too long for a piece.
    """
    pieces, piece = [], ""
    for paragraph in re.split(r"\n\s*\n", text.expandtabs(4)):
        for part in _fitting(paragraph, longest):
            if len(piece) + len(part) + 2 > longest:
                pieces.append(piece)
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    return [piece for piece in [*pieces, piece] if len(piece) >= shortest]


def _fitting(paragraph: str, longest: int) -> list[str]:
    """A paragraph, or its lines in groups where it is too long."""
    parts, part = [], ""
    for line in paragraph.rstrip().split("\n"):
        if len(line) > longest:
            continue
        if len(part) + len(line) + 1 > longest:
            parts.append(part)
            part = ""
        part = f"{part}\n{line}" if part else line
    return [part for part in [*parts, part] if part.strip()]
