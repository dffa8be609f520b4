"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are words, and the others numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def as_text(*parts: Any, width: int = 100) -> str:
    """Return what `parts` look like on a plain terminal of this width."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def human(count: float, unit: str = "") -> str:
    """A count with three digits and a decimal prefix: `human(1234567, "B")` is `"1.23 MB"`."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            break
        count /= 1000
    digits = f"{count:.0f}" if not prefix and count == int(count) else f"{count:.3g}"
    return f"{digits} {prefix}{unit}".strip()
