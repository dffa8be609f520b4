"""What was predicted before the runs (the benchmark's README has the words and the reasons), and what came out."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from statistics import mean
from typing import Any

from ...reporting import table
from ..methods.registry import TITLES
from ..text.tasks import TASKS
from .advice import WHERE, between
from .cells import Results, cross_names, figure, interval
from .paired import BITS, EXACT


Row = dict[str, Any]
LANGUAGES = [name for name, task in TASKS.items() if task.metric == "chrf"]


@dataclass(frozen=True)
class Prediction:
    """`ours` less `baseline` is from `low` to `high`; without a baseline, the figure itself is."""

    ours: str
    baseline: str | None
    on: str  # average, mixed, cross, cross_long, cross_few; for chrF, a language
    low: float
    high: float
    figure: str = BITS  # or EXACT, or CHRF
    models: str | None = None  # of another kind than the main ones, as the table of gaps calls them
    spent: int = 0  # sets of models, the first ones, that it was made from: they cannot speak for it


def of_each(names: tuple[str, ...], baseline: str, on: str, low: float, high: float) -> Iterator[Prediction]:
    return (Prediction(name, baseline, on, low, high) for name in names)


def right(name: str, on: str, low: float, high: float) -> Prediction:
    """So many right answers, in percent."""
    return Prediction(name, None, on, low, high, EXACT)


CHRF = "chrf"
GATES, PAPER, BOTH, SMALL, EVIDENCE = "outputs", "bts", "bts_outputs", "bts_token_r8_outputs", "outputs_evidence"
BOTH_EVIDENCE = "bts_outputs_evidence"
FIRST = [
    Prediction(BOTH, GATES, "average", -0.02, 0),
    Prediction(BOTH, PAPER, "average", -0.03, 0),
    *of_each((GATES, PAPER, BOTH), "btm", "average", -0.05, -0.02),
    *of_each((GATES, PAPER, BOTH), "routing", "average", -inf, -0.02),
    *of_each((GATES, PAPER, BOTH), "token_router", "average", -0.03, -0.01),
    *of_each((GATES, PAPER, BOTH), "btm", "mixed", -0.1, -0.04),
    *of_each((GATES, PAPER, BOTH), "routing", "mixed", -inf, -0.04),
    Prediction(BOTH, GATES, "mixed", -0.02, 0),
    *(right(name, "cross", 10, 40) for name in (PAPER, BOTH, SMALL)),
    *(right(name, "cross", 0, 5) for name in (GATES, "dense")),
]
OF_EVIDENCE = [
    Prediction(EVIDENCE, "btm", "average", -0.008, -0.003, spent=1),
    Prediction(EVIDENCE, "btm_forgetting", "average", -0.006, -0.002, spent=1),
    Prediction(EVIDENCE, GATES, "average", -0.006, -0.002, spent=1),
    Prediction(EVIDENCE, "btm", "mixed", -0.09, -0.06, spent=1),
    Prediction(EVIDENCE, "btm_forgetting", "mixed", -0.04, -0.01, spent=1),
    Prediction(EVIDENCE, GATES, "mixed", -0.05, -0.02, spent=1),
    Prediction(BOTH_EVIDENCE, EVIDENCE, "average", -0.005, -0.002, spent=1),
    Prediction(BOTH_EVIDENCE, EVIDENCE, "mixed", -0.02, -0.005, spent=1),
]
OF_OTHER_PARTS = [
    *(Prediction(f"{name}_switches", name, "average", -inf, 0.005) for name in (GATES, BOTH)),
    *(Prediction(f"{name}_switches", name, "mixed", -0.04, -0.02) for name in (GATES, BOTH)),
    *(Prediction(PAPER, name, "average", 0, 0.1) for name in ("btx_soft", "btx_sample", "bam_adapters")),
    Prediction("lora", None, "average", 1.78, 1.79),
    *(Prediction(name, "btm", language, -1, 1, CHRF) for name in (GATES, EVIDENCE) for language in LANGUAGES),
    *(Prediction(PAPER, "btm", language, -inf, -2, CHRF) for language in LANGUAGES),
    *(Prediction(name, None, "cross", 2, inf) for name in ("soup", "btm")),
    Prediction(BOTH, "btx_soft", "cross", -0.2, 0.2),
    Prediction(BOTH, "dense_maths", "cross", -0.3, 0.3),
    *of_each((PAPER, BOTH, SMALL), "dense", "cross_few", -inf, 0),
    right(BOTH, "cross_long", 3, 20),
    right(PAPER, "cross_long", 1, 10),
    right("dense", "cross_long", 0, 2),
    *(right(name, "cross_long", 3, 30) for name in ("dense_maths", "btx_soft")),
    right("bts_outputs_hub_maths", "cross_long", 5, 40),
    Prediction("bts_experts_into_hub", PAPER, "cross", 0.05, 0.3),
    Prediction("bts_outputs_experts_into_hub", BOTH, "cross", 0.05, 0.3),
    Prediction("bts_k1", PAPER, "cross", 0.1, 0.4),
    Prediction("bts_outputs_k1", BOTH, "cross", 0.1, 0.4),
    Prediction("bts_kL", "bts_k1", "average", -0.1, -0.02),
    *of_each(("bts_experts_into_hub", "bts_token", "bts_token_r8"), PAPER, "average", -0.03, 0.03),
    Prediction("bts_init_near_seed", PAPER, "average", -inf, 0),
    Prediction("bts_init_torch", PAPER, "average", 0, inf),
    *of_each(("bts_outputs_k1", "bts_outputs_experts_into_hub", "bts_outputs_init_near_seed"), BOTH, "average",
             -0.01, 0.01),
    *(Prediction(EVIDENCE, "btm_forgetting", "average", -0.012, -0.003, models=size) for size in ("0.3M", "2.4M")),
]  # fmt: skip
PREDICTIONS = {
    "before the first run": FIRST,
    "before output gates with evidence were run": OF_EVIDENCE,
    "before the parts behind the verdict": OF_OTHER_PARTS,
}


def predictions(results: Results) -> str:
    """What has results, as a section of the report. Predictions are of the preset `full`."""
    if results["preset"] != "full":
        return ""
    rows, held = [], []
    for when, made in PREDICTIONS.items():
        for one in made:
            if found := found_of(results, one):
                held.append(one.low <= found["difference"] <= one.high)
                rows.append([when, *cells(one, found), "yes" if held[-1] else "**no**"])
    if not rows:
        return ""
    heads = ["written", "of", "on", "predicted", "found (95%)", "sets", "as predicted"]
    return (
        "## What was predicted\n\nBefore the runs; reasons, and predictions in words, are in the benchmark's README. "
        "Bits per byte, the first less the second, if nothing else is said. Predictions of evidence were made from "
        "the first set's models, so their figures are means of the other sets, without an interval. "
        f"{sum(held)} of {len(held)} came out as predicted.\n\n" + table(heads, rows, left=3)
    )


def found_of(results: Results, prediction: Prediction) -> Row | None:
    """The difference with its interval, or the figure of one method, and the number of sets."""
    if prediction.figure == CHRF:
        return chrf(results, prediction)
    if prediction.baseline is None:
        return alone(results, prediction)
    if prediction.spent:
        return of_other_sets(results, prediction)
    if prediction.models is None:
        return between(results, prediction.ours, prediction.baseline, prediction.on)
    kinds = [rows for what, rows in results["gaps"].items() if what.split(",")[0] == prediction.models]
    pair = (prediction.ours, prediction.baseline, prediction.on)
    found = [row for rows in kinds if (row := between({"paired": rows}, *pair))]
    return max(reversed(found), key=lambda row: row["sets"], default=None)  # of the last run, of two with as many


def alone(results: Results, prediction: Prediction) -> Row | None:
    crossing = prediction.on.startswith("cross")
    rows = results["cross"].get(cross_names(results).get(prediction.on, ""), {}) if crossing else results["methods"]
    if prediction.ours not in rows:
        return None
    row = rows[prediction.ours]
    bits = row["bits_per_byte"]
    spread = row["average"] if prediction.figure == EXACT else bits if crossing else bits[prediction.on]
    return {"difference": spread["mean"], "spread": spread, "sets": spread["n"]}


def of_other_sets(results: Results, prediction: Prediction) -> Row | None:
    """Without the sets that a prediction was made from; both methods' sets are counted alike within a run."""
    rows = [results["methods"].get(name) for name in (prediction.ours, prediction.baseline)]
    if None in rows or rows[0].get("run", 0) != rows[1].get("run", 0):
        return None
    ours, theirs = (row["bits_per_byte"][prediction.on]["values"][prediction.spent :] for row in rows)
    differences = [a - b for a, b in zip(ours, theirs)]
    return {"difference": mean(differences), "sets": len(differences)} if differences else None


def chrf(results: Results, prediction: Prediction) -> Row | None:
    """Of translations that were asked alone; both methods' are of the same sets."""
    found = [results["prompts"].get(name, {}).get(prediction.on, {}).get("chrf", {}).get("alone")
             for name in (prediction.ours, prediction.baseline)]  # fmt: skip
    if None in found:
        return None
    return {"difference": found[0]["mean"] - found[1]["mean"], "sets": min(one["n"] for one in found)}


def cells(prediction: Prediction, found: Row) -> list[Any]:
    digits = 3 if prediction.figure == BITS else 1
    of = TITLES[prediction.ours]
    if prediction.baseline:
        of += f" less {TITLES[prediction.baseline]}"
    what = {BITS: "", EXACT: ", right answers in percent", CHRF: ", chrF"}[prediction.figure]
    where = WHERE.get(prediction.on, prediction.on) + (f", {prediction.models}" if prediction.models else "") + what
    if "spread" in found:
        written = figure(found["spread"], digits)
    else:
        written = interval(found, digits) if "low" in found else f"{found['difference']:+.{digits}f}"
    return [of, where, bounds(prediction.low, prediction.high, digits), written, found["sets"]]


def bounds(low: float, high: float, digits: int) -> str:
    if low == -inf:
        return f"less than {high:.{digits}f}"
    if high == inf:
        return f"more than {low:.{digits}f}"
    return f"{low:.{digits}f} to {high:.{digits}f}"
