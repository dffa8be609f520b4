"""The results of a run that goes on from an earlier one (`work/earlier.py`), with the figures of both.

Of every figure the one over more sets is kept, and of two over as many, the new one. Means of different runs are of
different sets: what only one of them has is compared with the rest by differences, which are within one run.
"""

from collections.abc import Callable
from typing import Any

from ..methods.registry import TITLES
from .claims import CLAIMS, other_claims
from .targets import targets


Row = dict[str, Any]
ON = ["average", "mixed", "tasks", "cross", "cross_long"]


def merged(new: Row, earlier: Row) -> Row:
    """The new results where they are over as many sets as the earlier ones, or there are no earlier ones."""
    results = {
        **new,
        **origin(new, earlier),
        "sets": max(new["sets"], earlier["sets"]),
        "trained": by_name(new["trained"], earlier["trained"], lambda row: row["to_seed"]["n"]),
        "methods": methods(new["methods"], earlier["methods"]),
        "lora": methods(new["lora"], earlier["lora"]),
        "gates": by_name(new["gates"], earlier["gates"], lambda row: row["sets"]),
        "forgetting": by_name(new["forgetting"], earlier["forgetting"], lambda row: row["mixed"]["n"]),
        "cost": max(new["cost"], earlier["cost"], key=lambda cost: len(cost.get("ratios", {}))),
        "paired": pairs(new["paired"], earlier["paired"]),
    }
    for part in ("cross", "sizes"):
        names = dict.fromkeys([*earlier[part], *new[part]])
        results[part] = {name: methods(new[part].get(name, {}), earlier[part].get(name, {})) for name in names}
    names = dict.fromkeys([*new["gaps"], *earlier["gaps"]])
    results["gaps"] = {name: pairs(new["gaps"].get(name, []), earlier["gaps"].get(name, [])) for name in names}
    results["claims"] = claims(new["claims"], earlier["claims"]) + other_claims(results)
    results["targets"] = targets(results)
    return results


def more(new: Row | None, earlier: Row | None, sets: Callable[[Row], int]) -> Row:
    """The one over more sets, of those that there are; the new one of two over as many."""
    return max((row for row in (new, earlier) if row), key=sets)


def by_name(new: dict[str, Row], earlier: dict[str, Row], sets: Callable[[Row], int]) -> dict[str, Row]:
    names = dict.fromkeys([*earlier, *new])
    return {name: more(new.get(name), earlier.get(name), sets) for name in names}


def origin(new: Row, earlier: Row) -> Row:
    """Both runs' time and commits. Of a part that both have worked on, the count of the one that got further: what one
    has of it, the other may have, too."""
    parts = {
        name: max(counts, earlier["pieces"]["parts"].get(name, counts), key=lambda pair: pair[0])
        for name, counts in new["pieces"]["parts"].items()
    }
    return {
        "pieces": {**new["pieces"], "done": max(new["pieces"]["done"], earlier["pieces"]["done"]), "parts": parts},
        "commits": sorted({*new["commits"], *earlier["commits"]}),
        "core_minutes": new["core_minutes"] + earlier["core_minutes"],
        "earlier": [*earlier.get("earlier", []), {key: earlier[key] for key in ("commit", "sets", "core_minutes")}],
    }


def methods(new: dict[str, Row], earlier: dict[str, Row]) -> dict[str, Row]:
    """Rows by method, in the order of the tables. Of its tasks, what was asked both ways comes first."""
    found = by_name(new, earlier, average_sets)
    for name, row in found.items():
        other = new.get(name) if row is not new.get(name) else earlier.get(name)
        if other and "tasks" in row and "tasks" in other:
            tasks = {task: other["tasks"][task] if asked_both(other["tasks"][task]) > asked_both(one) else one
                     for task, one in row["tasks"].items()}  # fmt: skip
            found[name] = {**row, "tasks": tasks}
    return {name: found[name] for name in TITLES if name in found}


def average_sets(row: Row) -> int:
    spread = row["bits_per_byte"]
    return spread.get("average", spread)["n"]


def asked_both(task: Row) -> int:
    """On how many sets."""
    return max(task.get("four", {}).get("n", 0), *(one["n"] for one in task.get("chrf", {}).values()), 0)


def pairs(new: list[Row], earlier: list[Row]) -> list[Row]:
    def key(row: Row) -> str:
        return "/".join(row[part] for part in ("ours", "baseline", "on", "figure"))

    found = by_name({key(row): row for row in new}, {key(row): row for row in earlier}, lambda row: row["sets"])
    return sorted(found.values(), key=lambda row: ON.index(row["on"]))


def claims(new: list[Row], earlier: list[Row]) -> list[Row]:
    """Verdicts that have intervals; the others are made of the merged figures."""
    with_sets = [{row["id"]: row for row in rows if row["sets"]} for rows in (new, earlier)]
    found = by_name(*with_sets, lambda row: row["sets"])
    return [found[claim.id] for claim in CLAIMS if claim.id in found]
