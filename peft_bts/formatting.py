"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text


_UNLIMITED = 100_000  # columns of a terminal


@dataclass(frozen=True)
class TextTable:
    """A table that rich prints without cutting anything: where it is too wide it is turned, or becomes a list.

    Attributes:
        title, caption: What stands above and below it.
        columns: Their names.
        rows: The cells, as they are printed.
        left: How many columns are words; the others are numbers, aligned on the right.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    caption: Optional[str] = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        for made in (self.as_it_is(), self._turned()):
            if _width(made, console) <= options.max_width:
                yield made
                return
        yield self._listed()

    def as_it_is(self) -> Table:
        """The table for rich."""
        return self._make(self.columns, self.rows, self.left)

    def _turned(self) -> Table:
        """Columns as rows."""
        first, *others = zip(self.columns, *self.rows)
        return self._make(first, others, 1)

    def _listed(self) -> Table:
        """A block of lines for each row; only here, what is longer than a line is broken."""
        blocks = [[*zip(self.columns, row)] for row in self.rows]
        pairs = [list(pair) for block in blocks for pair in (*block, ("", ""))]
        return self._make(["", ""], pairs[:-1], 2)

    def _make(self, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Table:
        made = Table(
            title=Text(self.title, style="bold") if self.title else None,
            caption=None if self.caption is None else Text(self.caption),
            box=box.SIMPLE_HEAD,
            show_header=any(columns),
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        for index, column in enumerate(columns):
            made.add_column(Text(column), justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            made.add_row(*map(Text, row))
        return made


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1, caption: Optional[str] = None
) -> TextTable:
    """A table whose first `left` columns are words, and the others numbers."""
    cells = [
        ["" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows
    ]
    return TextTable(title, list(columns), cells, left, caption)


def as_text(*parts: Any, width: Optional[int] = 100) -> str:
    """Return what `parts` look like in plain text, tables as wide as they are.

    Args:
        *parts: Strings, `TextTable`s, and objects whose `__rich__` returns one.
        width: Strings are broken into lines of at most so many characters; `None` leaves them alone.
    """
    lines: list[str] = []
    for part in parts:
        part = part.__rich__() if hasattr(part, "__rich__") else part
        console = Console(width=width or _UNLIMITED, color_system=None, force_terminal=False)
        if isinstance(part, TextTable):
            part = part.as_it_is()
            console.width = max(_width(part, console), 1)
        with console.capture() as captured:
            console.print(part, markup=False, highlight=False)
        lines += (line.rstrip() for line in captured.get().splitlines())
    return "\n".join(lines).rstrip()


def _width(made: Table, console: Console) -> int:
    """Return how many columns of a terminal a table takes if no cell is broken."""
    return console.measure(made, options=console.options.update(max_width=_UNLIMITED)).maximum


def human(count: float, unit: str = "") -> str:
    """A count with three digits and a decimal prefix: `human(1234567, "B")` is `"1.23 MB"`."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            break
        count /= 1000
    digits = f"{count:.0f}" if not prefix and count == int(count) else f"{count:.3g}"
    return f"{digits} {prefix}{unit}".strip()
