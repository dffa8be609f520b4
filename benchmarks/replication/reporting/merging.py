"""The results of a run that goes on from an earlier one (`work/earlier.py`), with the figures of both.

Of every figure the one over more sets is kept, and of two over as many, the new one. Two runs are of different models,
so they are never pooled, and rows of methods say of which `run` they are (0, where they do not): only rows of one run
and of as many sets may be compared by their means. Differences and claims are within one run.
"""

from collections.abc import Callable
from typing import Any

from ..methods.registry import TITLES
from ..work.earlier import runs_of
from .cells import Results, models_of
from .claims import CLAIMS, other_claims
from .targets import targets


Row = dict[str, Any]
ON = ["average", "mixed", "tasks", "cross", "cross_long", "cross_few"]


def merged(new: Results, earlier: Results) -> Results:
    """What both runs found."""
    runs = [*runs_of(earlier), *runs_of(new)]
    number = len(runs) - 1

    def both(part: str, name: str | None = None) -> dict[str, Row]:
        found = [results.get(part, {}) if name is None else results[part].get(name, {}) for results in (new, earlier)]
        stamped = {method: {**row, "run": number} for method, row in found[0].items()}
        rows = by_name(stamped, found[1], lambda row: models_of(row)[0])
        return {method: rows[method] for method in TITLES if method in rows}

    results = {
        **new,
        "runs": runs,
        "pieces": {"parts": parts(new["pieces"]["parts"], earlier["pieces"]["parts"])},
        "commits": sorted({*new["commits"], *earlier["commits"]}),
        "core_minutes": sum(run["core_minutes"] for run in runs),
        "sets": max(new["sets"], earlier["sets"]),
        "methods": both("methods"),
        "lora": both("lora"),
        "prompts": new["prompts"] or earlier.get("prompts", {}),
        "gates": by_name(new["gates"], earlier["gates"], lambda row: row["sets"]),
        "forgetting": by_name(new["forgetting"], earlier["forgetting"], lambda row: row["mixed"]["n"]),
        "cost": costs(new["cost"], earlier["cost"]),
        "paired": pairs(new["paired"], earlier["paired"]),
        **{
            part: {**earlier[part], **{f"{name}, run {number + 1}": rows for name, rows in new[part].items()}}
            for part in ("gaps", "trained_of")
            if part in earlier
        },
    }
    for part in ("cross", "sizes"):
        results[part] = {name: both(part, name) for name in dict.fromkeys([*earlier[part], *new[part]])}
    results["claims"] = claims(new["claims"], earlier["claims"]) + other_claims(results)
    results["targets"] = targets(results)
    return results


def by_name(new: dict[str, Row], earlier: dict[str, Row], sets: Callable[[Row], int]) -> dict[str, Row]:
    """Of every name the row over more sets; the new one of two over as many."""
    names = dict.fromkeys([*earlier, *new])
    return {name: max((rows[name] for rows in (new, earlier) if name in rows), key=sets) for name in names}


def costs(new: Row, earlier: Row) -> Row:
    """The earlier run's, with rows of the new one for methods that only it measured: all are ratios to the seed."""
    if not (new and earlier):
        return new or earlier
    ratios = {**new["ratios"], **earlier["ratios"]}
    return {**earlier, "ratios": {name: ratios[name] for name in TITLES if name in ratios}}


def parts(new: dict[str, list[int]], earlier: dict[str, list[int]]) -> dict[str, list[int]]:
    """Pieces done, and all, of the run that got further with a part: what one has of it, the other may have, too."""
    return {
        name: max(counts, earlier.get(name, counts), key=lambda pair: pair[0] / max(pair[1], 1))
        for name, counts in new.items()
    }


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
