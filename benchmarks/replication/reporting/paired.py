"""Paired differences between methods, with their intervals.

A difference is one method less another on the same sets and the same documents, with the middle 95% of it when both
are drawn again (`bootstrap.py`). Fewer bits per byte are better, so negative differences of them favour the first
method; of right answers, positive ones do. With a single set, an interval says nothing about other models.
"""

from typing import Any

from ..measures.bootstrap import Interval, paired
from ..methods.registry import form_of, is_ours
from ..work.presets import FORMS
from .tables import ON, Table


BITS, EXACT = "bits_per_byte", "exact"


def common_sets(table: Table, a: str, b: str) -> list[int]:
    return [number for number in table.sets(a) if number in table.sets(b)]


def difference(table: Table, a: str, b: str, tests: list[str], figure: str) -> Interval | None:
    """a less b, averaged over tests; `None` if no set has both."""
    sets = common_sets(table, a, b)
    if not sets:
        return None
    ours, theirs = ({test: table.amounts(name, test, figure, sets) for test in tests} for name in (a, b))
    return paired(ours, theirs, {test: table.units(test, figure) for test in tests})


def better(found: Interval, figure: str) -> int:
    """1 if the interval says that the first is better, -1 if it says the opposite, else 0."""
    sign = -1 if figure == BITS else 1
    low, high = sorted((sign * found.low, sign * found.high))
    return 1 if low > 0 else -1 if high < 0 else 0


def row(table: Table, ours: str, baseline: str, on: str, figure: str) -> dict[str, Any] | None:
    found = difference(table, ours, baseline, ON[on], figure)
    if found is None:
        return None
    sets = len(common_sets(table, ours, baseline))
    return {"ours": ours, "baseline": baseline, "on": on, "figure": figure, "difference": found.value,
            "low": found.low, "high": found.high, "sets": sets}  # fmt: skip


BESIDES = [("bts_outputs_evidence", "outputs_evidence"), ("bts_kL", "bts_k1")]  # neither is the other's form


def paired_rows(main: Table, cross: dict[str, Table]) -> list[dict[str, Any]]:
    """Each of our main forms against every baseline and against each other, and variants against the form that they
    are of; each table of the cross task, by what it is `on`, with all of ours."""
    rows = []
    for on, figure in (("average", BITS), ("mixed", BITS), ("tasks", EXACT)):
        names = [name for name in main.methods if not name.startswith("oracle")]
        pairs = [
            (ours, other)
            for ours in names
            for other in names
            if ours in FORMS and other != ours and (other in FORMS or not is_ours(other))
        ]
        variants = [name for name in names if is_ours(name) and name not in FORMS]
        pairs += [(name, form_of(name)) for name in variants]
        pairs += [pair for pair in BESIDES if {*pair} <= {*names}]
        rows += [row(main, *pair, on, figure) for pair in pairs]
    for on, table in cross.items():
        for figure in (BITS, EXACT):
            names = table.methods
            pairs = [(ours, other) for ours in names for other in names if is_ours(ours) and ours != other]
            rows += [row(table, *pair, on, figure) for pair in pairs]
    return [found for found in rows if found]


# Whether what holds for the main models holds for others, too.
GAPS = [
    ("outputs_evidence", "btm_forgetting"),
    ("outputs_evidence", "btm_forgetting_fast"),
    ("outputs", "btm"),
    ("bts_outputs", "outputs"),
    ("bts", "btm"),
]


def gap_rows(table: Table) -> list[dict[str, Any]]:
    """The differences of `GAPS`, on the average of the domains and on mixed text."""
    names = table.methods
    rows = [row(table, *pair, on, BITS) for on in ("average", "mixed") for pair in GAPS if {*pair} <= {*names}]
    return [found for found in rows if found]
