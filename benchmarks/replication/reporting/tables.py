"""The results of one table of the study, as arrays over sets and documents."""

import math
from functools import cached_property
from typing import Any

import numpy as np

from ..methods.registry import ORACLES, TITLES
from ..text.corpora import DOMAINS, MIXED
from ..text.tasks import CROSS, TASKS
from ..work.combining import Study
from ..work.plan import Plan
from ..work.presets import Part


TEXT = [f"text/{domain}" for domain in DOMAINS]
MIXED_TEXT = [f"mixed/{kind}" for kind in MIXED]
EXACT = [f"alone/{name}" for name, task in TASKS.items() if task.metric == "exact"]
ON = {
    "average": TEXT,
    "mixed": MIXED_TEXT,
    "tasks": EXACT,
    "cross": [f"alone/{CROSS}"],
    "cross_long": [f"alone/{CROSS}"],
    "cross_few": [f"alone/{CROSS}"],
}


class Table:
    """The results of one size and table, as arrays over sets and documents."""

    def __init__(self, plan: Plan, part: Part) -> None:
        self.plan, self.part = plan, part
        self.studies = plan.studies(part)
        self._read: dict[tuple[int, str, str], dict[str, Any]] = {}

    @cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        return {name: np.array(part) for name, part in self.plan.store.read("tests")["sizes"].items()}

    def piece(self, study: Study, method: str, what: str = "test") -> dict[str, Any] | None:
        """A piece's result on one set, if it is done."""
        oracle = method in ORACLES and what == "test"
        name = study.name("oracles") if oracle else study.name(method, what)
        key = (study.set.number, method, what)
        if key not in self._read and self.plan.store.has(name):
            found = self.plan.store.read(name)
            self._read[key] = {**found, "tests": found["tests"][method]} if oracle else found
        return self._read.get(key)

    @cached_property
    def whole(self) -> list[int]:
        """The sets on which all methods of the first part that fills this table are tested; if there are none, all.

        Only these are reported: means over different sets are not to be compared. A run that goes on from an earlier
        one has all of its sets: it is there for what the earlier one has not, and its rows are marked.
        """
        if self.plan.earlier:
            return [study.set.number for study in self.studies]
        parts = (
            part for part in self.plan.preset.parts if (part.size, part.table) == (self.part.size, self.part.table)
        )
        methods = next(parts).methods
        numbers = [study.set.number for study in self.studies]
        tested = lambda study: all(self.piece(study, name) for name in (*study.alone, *methods))  # noqa: E731
        return [study.set.number for study in self.studies if tested(study)] or numbers

    def sets(self, method: str, what: str = "test") -> list[int]:
        """The sets on which a piece of a method is done, of those that are reported."""
        done = [study.set.number for study in self.studies if self.piece(study, method, what)]
        return [number for number in done if number in self.whole]

    @property
    def methods(self) -> list[str]:
        """Those with a test on some set, in the order of the tables."""
        names = [*self.studies[0].methods, *(ORACLES if self.part.kind == "main" else ())]
        return [name for name in TITLES if name in names and self.sets(name)]

    def amounts(self, method: str, test: str, figure: str, sets: list[int], what: str = "test") -> np.ndarray:
        """(sets, documents): bits (figure "bits_per_byte"), or 100 for each right answer ("exact")."""
        rows = []
        for number in sets:
            piece = self.piece(self.studies[number], method, what)
            assert piece is not None
            found = piece["tests"][test]
            rows.append(
                np.array(found["nats"]) / math.log(2) if figure == "bits_per_byte" else
                100.0 * np.array([letter == "1" for letter in found["right"]])
            )  # fmt: skip
        return np.stack(rows)

    def units(self, test: str, figure: str) -> np.ndarray:
        return self.sizes[test].astype(float) if figure == "bits_per_byte" else np.ones(len(self.sizes[test]))

    def values(
        self, method: str, tests: list[str], figure: str, what: str = "test", sets: list[int] | None = None
    ) -> list[float]:
        """The figure of every set that has the method, or of those that are given, averaged over tests."""
        sets = self.sets(method, what) if sets is None else sets
        each = [
            self.amounts(method, test, figure, sets, what).sum(1) / self.units(test, figure).sum() for test in tests
        ]
        return [float(value) for value in np.mean(each, axis=0)]
