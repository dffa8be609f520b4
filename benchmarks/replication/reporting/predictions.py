"""What was predicted before the runs (the benchmark's README has the words and the reasons), and what came out."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from ...reporting import table
from ..methods.registry import TITLES
from .advice import WHERE, between
from .cells import Results, cross_names, figure, interval


@dataclass(frozen=True)
class Prediction:
    """`ours` less `baseline` is from `low` to `high`; without a baseline, the percentage of right answers is."""

    ours: str
    baseline: str | None
    on: str  # average, mixed, cross, cross_long, cross_few
    low: float
    high: float
    models: str | None = None  # of another kind than the main ones, as the table of gaps calls them


def of_each(names: tuple[str, ...], baseline: str, on: str, low: float, high: float) -> Iterator[Prediction]:
    return (Prediction(name, baseline, on, low, high) for name in names)


GATES, PAPER, BOTH, EVIDENCE = "outputs", "bts", "bts_outputs", "outputs_evidence"
FIRST = [
    Prediction(BOTH, GATES, "average", -0.02, 0),
    Prediction(BOTH, PAPER, "average", -0.03, 0),
    *of_each((GATES, PAPER, BOTH), "btm", "average", -0.05, -0.02),
    *of_each((GATES, PAPER, BOTH), "routing", "average", -inf, -0.02),
    *of_each((GATES, PAPER, BOTH), "token_router", "average", -0.03, -0.01),
    *of_each((GATES, PAPER, BOTH), "btm", "mixed", -0.1, -0.04),
    Prediction(BOTH, GATES, "mixed", -0.02, 0),
    *(Prediction(name, None, "cross", 10, 40) for name in (PAPER, BOTH)),
    *(Prediction(name, None, "cross", 0, 5) for name in (GATES, "dense")),
]
OF_EVIDENCE = [
    Prediction(EVIDENCE, "btm", "average", -0.008, -0.003),
    Prediction(EVIDENCE, "btm_forgetting", "average", -0.006, -0.002),
    Prediction(EVIDENCE, GATES, "average", -0.006, -0.002),
    Prediction(EVIDENCE, "btm", "mixed", -0.09, -0.06),
    Prediction(EVIDENCE, "btm_forgetting", "mixed", -0.04, -0.01),
    Prediction(EVIDENCE, GATES, "mixed", -0.05, -0.02),
    Prediction("bts_outputs_evidence", EVIDENCE, "average", -0.005, -0.002),
    Prediction("bts_outputs_evidence", EVIDENCE, "mixed", -0.02, -0.005),
]
OF_OTHER_PARTS = [
    *(Prediction(f"{name}_switches", name, "average", -inf, 0.005) for name in (GATES, BOTH)),
    *(Prediction(f"{name}_switches", name, "mixed", -0.04, -0.02) for name in (GATES, BOTH)),
    *(Prediction(PAPER, name, "average", 0, 0.1) for name in ("btx_soft", "btx_sample", "bam_adapters")),
    Prediction(BOTH, "dense", "cross_few", -inf, 0),
    Prediction(BOTH, None, "cross_long", 3, 20),
    Prediction(PAPER, None, "cross_long", 1, 10),
    Prediction("dense", None, "cross_long", 0, 2),
    Prediction("dense_maths", None, "cross_long", 3, 30),
    Prediction("btx_soft", None, "cross_long", 3, 30),
    Prediction("bts_outputs_hub_maths", None, "cross_long", 5, 40),
    Prediction("bts_experts_into_hub", PAPER, "cross", 0.05, 0.3),
    Prediction("bts_outputs_experts_into_hub", BOTH, "cross", 0.05, 0.3),
    Prediction("bts_k1", PAPER, "cross", 0.1, 0.4),
    Prediction("bts_outputs_k1", BOTH, "cross", 0.1, 0.4),
    Prediction("bts_experts_into_hub", PAPER, "average", -0.03, 0.03),
    Prediction("bts_token", PAPER, "average", -0.03, 0.03),
    Prediction("bts_token_r8", PAPER, "average", -0.03, 0.03),
    Prediction("bts_init_near_seed", PAPER, "average", -inf, 0),
    Prediction("bts_init_torch", PAPER, "average", 0, inf),
    *(Prediction(f"{BOTH}_{variant}", BOTH, "average", -0.01, 0.01)
      for variant in ("k1", "experts_into_hub", "init_near_seed")),
    *(Prediction(EVIDENCE, "btm_forgetting", "average", -0.012, -0.003, size) for size in ("0.3M", "2.4M")),
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
    rows, right = [], []
    for when, made in PREDICTIONS.items():
        for one in made:
            found = found_of(results, one)
            if found:
                right.append(one.low <= found["difference"] <= one.high)
                rows.append([when, *cells(one, found), "yes" if right[-1] else "**no**"])
    if not rows:
        return ""
    heads = ["written", "of", "on", "predicted", "found (95%)", "sets", "as predicted"]
    return (
        "## What was predicted\n\nBefore the runs; reasons, and predictions without numbers, stand in the benchmark's "
        "README. Bits per byte, the first less the second; of one method alone, right answers in percent. "
        f"{sum(right)} of {len(right)} came out as predicted.\n\n" + table(heads, rows, left=3)
    )


def found_of(results: Results, prediction: Prediction) -> dict[str, Any] | None:
    """The difference with its interval, or the right answers, and the number of sets."""
    if prediction.baseline is None:
        methods = results["cross"].get(cross_names(results).get(prediction.on, ""), {})
        if prediction.ours not in methods:
            return None
        score = methods[prediction.ours]["average"]
        return {"difference": score["mean"], "score": score, "sets": score["n"]}
    if prediction.models is None:
        return between(results, prediction.ours, prediction.baseline, prediction.on)
    kinds = [rows for what, rows in results["gaps"].items() if what.split(",")[0] == prediction.models]
    for row in kinds[-1] if kinds else ():
        if (row["ours"], row["baseline"], row["on"]) == (prediction.ours, prediction.baseline, prediction.on):
            return row
    return None


def cells(prediction: Prediction, found: dict[str, Any]) -> list[Any]:
    if prediction.baseline is None:
        of, digits, written = TITLES[prediction.ours], 0, figure(found["score"], 1)
    else:
        of, digits, written = f"{TITLES[prediction.ours]} less {TITLES[prediction.baseline]}", 3, interval(found)
    where = WHERE[prediction.on] + (f", {prediction.models}" if prediction.models else "")
    return [of, where, bounds(prediction.low, prediction.high, digits), written, found["sets"]]


def bounds(low: float, high: float, digits: int) -> str:
    if low == -inf:
        return f"less than {high:.{digits}f}"
    if high == inf:
        return f"more than {low:.{digits}f}"
    return f"{low:.{digits}f} to {high:.{digits}f}"
