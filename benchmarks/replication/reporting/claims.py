"""The paper's claims one by one: its figures, ours, and the verdict."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..branching.models import EXPERTS
from ..text.tasks import CROSS
from .paired import BITS, EXACT, better, common_sets, difference
from .tables import ON, Table


REPRODUCED, TIE, NOT = "reproduced", "tie", "not reproduced"
FEW = 1.0  # right answers in percent, of which too few tell methods apart


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
    Claim("cross_needs_data", "Cross capability without in-domain data: BTS does not beat the seed", (12.8, 10.0),
          "seed", "bts", f"alone/{CROSS}", "as good"),
    Claim("four_over_one", "4 stitches beat 1 on average", (28.1, 27.0), "bts", "bts_k1"),
    Claim("four_enough", "4 stitches are as good as many (paper: 10 of 20 layers; here every layer)", (28.1, 28.1),
          "bts", "bts_kL", relation="as good"),
    Claim("into_hub_only", "Experts-into-Hub only is as good as alternating on average", (28.4, 28.1),
          "bts_experts_into_hub", "bts", relation="as good"),
    Claim("seed_as_hub", "The seed is a better hub than the maths expert", (28.1, 26.2), "bts", "bts_hub_maths"),
]  # fmt: skip


def claims(main: Table, cross: list[Table]) -> list[dict[str, Any]]:
    """The verdict on every claim about scores whose results are there; of the cross task, in the first of these tables
    that has both methods.

    Questions are compared by right answers, unless nearly nobody has any: then by bits per byte, as text is.
    """
    verdicts = []
    for claim in CLAIMS:
        tests = ON.get(claim.on, [claim.on])
        places = cross if claim.on == "cross" else [main]
        table = next((table for table in places if common_sets(table, claim.a, claim.b)), None)
        if table is None:
            continue
        figure = EXACT if claim.on.startswith(("cross", "alone")) else BITS
        if figure == EXACT and max(mean(table.values(name, tests, EXACT)) for name in (claim.a, claim.b)) < FEW:
            figure = BITS
        found = difference(table, claim.a, claim.b, tests, figure)
        assert found is not None
        outcome = better(found, figure)
        verdict = {1: REPRODUCED, 0: TIE, -1: NOT}[outcome]
        if claim.relation == "as good" and outcome == 0:
            verdict = REPRODUCED
        common = common_sets(table, claim.a, claim.b)
        both = [mean(table.values(name, tests, figure, sets=common)) for name in (claim.a, claim.b)]
        steps = f" ({table.part.steps} steps)" if table.part.steps else ""
        verdicts.append({
            "id": claim.id, "text": claim.text + steps, "paper": list(claim.paper), "figure": figure, "ours": both,
            "difference": found.value, "margin": (found.high - found.low) / 2, "low": found.low, "high": found.high,
            "sets": len(common), "verdict": verdict,
        })  # fmt: skip
    return verdicts


def other_claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts on what the paper says of gates and of weights; they have no intervals."""
    return [*gates_fit(results), *fewer_weights(results)]


def gates_fit(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Figure 2: on its own domain, an expert's gate is higher than on every other domain."""
    if "bts" not in results["gates"]:
        return []
    gates = results["gates"]["bts"]["mean"]
    fitting = [expert for expert in EXPERTS if max(gates, key=lambda domain: gates[domain][expert]) == expert]
    text = "Figures 2 and 3: an expert's gate is highest on its own domain (experts of which it is true)"
    return [without_interval("gates_fit", text, (3, 3), (len(fitting), len(EXPERTS)), len(fitting) == len(EXPERTS))]


def fewer_weights(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Table 2: weights trained by BTS, and by BAM adapters, in percent of all weights."""
    rows = [results["methods"][name] for name in ("bts", "bam_adapters") if name in results["methods"]]
    if len(rows) < 2:
        return []
    ours = [100 * row["trained_parameters"] / row["total_parameters"] for row in rows]
    text = "Table 2: BTS trains a smaller share of all weights than BAM adapters (in %)"
    paper = (100 * 0.264 / 11, 100 * 1.5 / 9.9)
    return [without_interval("fewer_weights", text, paper, (ours[0], ours[1]), ours[0] < ours[1])]


def without_interval(
    id: str, text: str, paper: tuple[float, float], ours: tuple[float, float], holds: bool
) -> dict[str, Any]:
    return {
        "id": id, "text": text, "paper": list(paper), "figure": None, "ours": list(ours),
        **dict.fromkeys(("difference", "margin", "low", "high", "sets")), "verdict": REPRODUCED if holds else NOT,
    }  # fmt: skip
