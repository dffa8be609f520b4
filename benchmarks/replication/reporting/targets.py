"""Our own targets: what was hoped for, and whether it came out."""

from typing import Any

from ..methods.registry import is_ours
from ..work.presets import FORMS
from .cells import models_of, on_the_same_sets
from .paired import BITS, EXACT


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was hoped for, and whether it came out; `met` is `None` where the results do not say."""
    return [
        best_everywhere(results, "average", "A form of ours is better than every baseline on the average of domains"),
        best_everywhere(results, "mixed", "A form of ours is better than every baseline on mixed text"),
        half_the_effort(results),
        *(
            beats_dense(results, on, figure)
            for on in ("cross", "cross_long")
            for figure in (BITS, EXACT)
            if on == "cross" or any(row["on"] == on for row in results["paired"])
        ),
    ]


def best_everywhere(results: dict[str, Any], on: str, text: str) -> dict[str, Any]:
    """The form with the fewest bits, against all baselines that are not ours."""
    methods = results["methods"]
    forms = on_the_same_sets({name: methods[name] for name in FORMS if name in methods})
    if not forms:
        return {"text": text, "met": None, "by": None, "not_beaten": []}
    best = min(forms, key=lambda name: methods[name]["bits_per_byte"][on]["mean"])
    rows = [row for row in results["paired"] if (row["ours"], row["on"]) == (best, on)]
    rows = [row for row in rows if not is_ours(row["baseline"])]
    missed = [row["baseline"] for row in rows if row["high"] >= 0]
    return {"text": text, "met": not missed if rows else None, "by": best, "not_beaten": missed}


def half_the_effort(results: dict[str, Any]) -> dict[str, Any]:
    """A form with at most half of the paper's form's weights, at half of the steps, against its loss at the end."""
    text = "Half of the paper's form's weights and half of its steps are enough for its loss on validation text"
    methods = results["methods"]
    if "bts" not in methods:
        return {"text": text, "met": None, "by": None, "not_beaten": []}
    goal, most = methods["bts"]["curve"]["1"]["mean"], methods["bts"]["trained_parameters"] / 2
    same = [name for name, row in methods.items() if models_of(row) == models_of(methods["bts"])]
    small = [name for name in same if is_ours(name) and methods[name]["trained_parameters"] <= most]
    small = [name for name in small if "0.5" in methods[name]["curve"]]
    good = [name for name in small if methods[name]["curve"]["0.5"]["mean"] <= goal]
    return {"text": text, "met": bool(good) if small else None, "by": ", ".join(good) or None, "not_beaten": []}


def beats_dense(results: dict[str, Any], on: str, figure: str) -> dict[str, Any]:
    what = "fewer bits per byte of the answers" if figure == BITS else "more right answers"
    task = "the cross task" if on == "cross" else "the cross task with more steps"
    text = f"On {task} a form of ours has {what} than the seed trained in full on the same data"
    rows = [row for row in results["paired"] if (row["on"], row["figure"]) == (on, figure)]
    rows = [row for row in rows if row["baseline"] == "dense"]
    good = [row["ours"] for row in rows if (row["high"] < 0 if figure == BITS else row["low"] > 0)]
    return {"text": text, "met": bool(good) if rows else None, "by": ", ".join(good) or None,
            "not_beaten": [] if good or not rows else ["dense"]}  # fmt: skip
