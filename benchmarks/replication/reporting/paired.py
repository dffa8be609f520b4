"""Paired differences between methods, with their intervals.

A difference is one method less another on the same sets and the same documents, with the middle 95% of it when both
are drawn again (`bootstrap.py`). Fewer bits per byte are better, so negative differences of them favour the first
method; of right answers, positive ones do. With a single set, an interval says nothing about other models.
"""

from typing import Any

from ..measures.bootstrap import Interval, paired
from ..methods.registry import is_ours
from ..work.presets import FORMS
from .tables import ON, Table


BITS, EXACT = "bits_per_byte", "exact"


def difference(table: Table, a: str, b: str, tests: list[str], figure: str) -> Interval | None:
    """a less b, averaged over tests; `None` if no set has both."""
    sets = [number for number in table.sets(a) if number in table.sets(b)]
    if not sets:
        return None
    ours, theirs = ({test: table.amounts(name, test, figure, sets) for test in tests} for name in (a, b))
    return paired(ours, theirs, {test: table.units(test, figure) for test in tests})


def better(found: Interval, figure: str) -> int:
    """1 if the interval says that the first is better, -1 if it says the opposite, else 0."""
    sign = -1 if figure == BITS else 1
    low, high = sorted((sign * found.low, sign * found.high))
    return 1 if low > 0 else -1 if high < 0 else 0


def paired_rows(main: Table, cross: Table | None, cross_long: Table | None) -> list[dict[str, Any]]:
    """Each of our main forms against every baseline and against each other; the cross task twice, of few steps and of
    many."""
    places = [(main, "average", BITS), (main, "mixed", BITS), (main, "tasks", EXACT)]
    for on, table in {"cross": cross, "cross_long": cross_long}.items():
        places += [(table, on, figure) for figure in (BITS, EXACT) if table]
    rows = []
    for table, on, figure in places:
        for ours in (name for name in table.methods if name in FORMS):
            for baseline in table.methods:
                if baseline.startswith("oracle") or baseline == ours or (is_ours(baseline) and baseline not in FORMS):
                    continue
                found = difference(table, ours, baseline, ON[on], figure)
                if found:
                    rows.append({"ours": ours, "baseline": baseline, "on": on, "figure": figure,
                                 "difference": found.value, "low": found.low, "high": found.high})  # fmt: skip
    return rows
