"""What follows from the figures: paired differences with their intervals, the paper's claims, our own targets.

A difference is one method less another on the same sets and the same documents, with the middle 95% of it when both
are drawn again (`bootstrap.py`). Fewer bits per byte are better, so negative differences of them favour the first
method; of right answers, positive ones do. With a single set, an interval says nothing about other models.
"""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..measures.bootstrap import Interval, paired
from ..methods.registry import is_ours
from ..work.presets import FORMS
from .tables import ON, Table


REPRODUCED, TIE, NOT = "reproduced", "tie", "not reproduced"
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


def paired_rows(main: Table, cross: Table | None) -> list[dict[str, Any]]:
    """Each of our main forms against every baseline and against each other."""
    places = [(main, "average", BITS), (main, "mixed", BITS), (main, "tasks", EXACT)]
    if cross:
        places += [(cross, "cross", BITS), (cross, "cross", EXACT)]
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


# --- The paper's claims ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """`a` is better than `b`, or as good; `paper` are the paper's two figures, in percent."""

    id: str
    text: str
    paper: tuple[float, float]
    a: str
    b: str
    on: str = "average"  # or "cross", or one test
    relation: str = "better"


CLAIMS = [
    Claim("bts_over_seed", "BTS beats the seed on average", (28.1, 24.0), "bts", "seed"),
    Claim("bts_over_soup", "BTS beats the model soup on average", (28.1, 25.7), "bts", "soup"),
    Claim("bts_over_btm", "BTS beats BTM on average", (28.1, 26.9), "bts", "btm"),
    Claim("bts_over_routing", "BTS beats expert routing on average", (28.1, 24.8), "bts", "routing"),
    Claim("bts_over_btx_sample", "BTS beats BTX Sample on average", (28.1, 25.7), "bts", "btx_sample"),
    Claim("bts_over_btx_soft", "BTS beats BTX Soft on average", (28.1, 27.4), "bts", "btx_soft"),
    Claim("bts_over_bam", "BTS beats BAM adapters on average", (28.1, 27.3), "bts", "bam_adapters"),
    Claim("keeps_code", "BTS is as good at Python as the Python expert (paper: MBPP)", (32.2, 32.0), "bts",
          "expert_python", "text/python", "as good"),
    Claim("keeps_math", "BTS is as good at maths as the maths expert (paper: MATH)", (10.6, 10.1), "bts",
          "expert_maths", "text/maths", "as good"),
    Claim("short_of_lang", "The French expert stays better at French than BTS (paper: FLORES source)", (31.9, 30.9),
          "expert_french", "bts", "text/french"),
    Claim("cross_over_seed", "Cross capability: BTS beats the seed", (16.0, 12.8), "bts", "seed", "cross"),
    Claim("cross_over_dense", "Cross capability: BTS beats the seed trained on the same data", (16.0, 14.0), "bts",
          "dense", "cross"),
    Claim("cross_over_bam", "Cross capability: BTS beats BAM adapters, frozen experts too", (16.0, 15.6), "bts",
          "bam_adapters", "cross"),
    Claim("cross_btx_over_bts", "Cross capability: BTX Soft, which trains everything, beats BTS", (17.6, 16.0),
          "btx_soft", "bts", "cross"),
    Claim("cross_alternating", "Cross capability: alternating stitches beat Experts-into-Hub only", (16.0, 11.6),
          "bts", "bts_experts_into_hub", "cross"),
    Claim("four_over_one", "4 stitches beat 1 on average", (28.1, 27.0), "bts", "bts_k1"),
    Claim("four_enough", "4 stitches are as good as many (paper: 10 of 20 layers; here every layer)", (28.1, 28.1),
          "bts", "bts_kL", relation="as good"),
    Claim("into_hub_only", "Experts-into-Hub only is as good as alternating on average", (28.4, 28.1),
          "bts_experts_into_hub", "bts", relation="as good"),
    Claim("seed_as_hub", "The seed is a better hub than the maths expert", (28.1, 26.2), "bts", "bts_hub_maths"),
]  # fmt: skip


def claims(main: Table, cross: Table | None) -> list[dict[str, Any]]:
    """The verdict on every claim whose results are there: by bits per byte; by right answers on the cross task."""
    verdicts = []
    for claim in CLAIMS:
        table, figure = (cross, EXACT) if claim.on == "cross" else (main, BITS)
        tests = ON.get(claim.on, [claim.on])
        found = difference(table, claim.a, claim.b, tests, figure) if table else None
        if table is None or found is None:
            continue
        outcome = better(found, figure)
        verdict = {1: REPRODUCED, 0: TIE, -1: NOT}[outcome]
        if claim.relation == "as good" and outcome == 0:
            verdict = REPRODUCED
        both = [mean(table.values(name, tests, figure)) for name in (claim.a, claim.b)]
        verdicts.append({
            "id": claim.id, "text": claim.text, "paper": list(claim.paper), "figure": figure, "ours": both,
            "difference": found.value, "margin": (found.high - found.low) / 2, "low": found.low, "high": found.high,
            "verdict": verdict,
        })  # fmt: skip
    return verdicts


# --- Our targets ----------------------------------------------------------------------------------------------------


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was hoped for, and whether it came out; `met` is `None` where the results do not say."""
    return [
        best_everywhere(results, "average", "A form of ours is better than every baseline on the average of domains"),
        best_everywhere(results, "mixed", "A form of ours is better than every baseline on mixed text"),
        half_the_effort(results),
        beats_dense(results),
    ]


def best_everywhere(results: dict[str, Any], on: str, text: str) -> dict[str, Any]:
    """The form with the fewest bits, against all baselines that are not ours."""
    methods = results["methods"]
    forms = [name for name in FORMS if name in methods]
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
    small = [name for name in methods if is_ours(name) and methods[name]["trained_parameters"] <= most]
    small = [name for name in small if "0.5" in methods[name]["curve"]]
    good = [name for name in small if methods[name]["curve"]["0.5"]["mean"] <= goal]
    return {"text": text, "met": bool(good) if small else None, "by": ", ".join(good) or None, "not_beaten": []}


def beats_dense(results: dict[str, Any]) -> dict[str, Any]:
    text = "On the cross task a form of ours has more right answers than the seed trained in full on the same data"
    rows = [row for row in results["paired"] if (row["on"], row["figure"]) == ("cross", EXACT)]
    rows = [row for row in rows if row["baseline"] == "dense"]
    good = [row["ours"] for row in rows if row["low"] > 0]
    return {"text": text, "met": bool(good) if rows else None, "by": ", ".join(good) or None,
            "not_beaten": [] if good or not rows else ["dense"]}  # fmt: skip
