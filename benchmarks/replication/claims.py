"""The paper's claims, one by one: what it found, what we found, and whether that is the same.

A claim compares two results, "a is better than b" or "a is as good as b". With d = a - b and a margin m:

    better     d > m: reproduced;   -m <= d <= m: tie;   d < -m: not reproduced
    as good    d >= -m: reproduced;                      d < -m: not reproduced

With several independent sets, m is half the 95% confidence interval of the mean of d over sets (Student's t). One set
says nothing about other seeds and experts; m is then two standard errors of what one set can tell: the choice of test
data, and the chance in a training, measured by training the paper's form again with its data in other orders.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import mean, stdev
from typing import Any


STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # 97.5% quantiles by number of sets

FLOOR = 1.0  # percent: a test that neither passes cannot tell them apart, whatever the claim

REPRODUCED, TIE, NOT = "reproduced", "tie", "not reproduced"


@dataclass
class Sample:
    """One result: its value in every set, the standard error of its test, the standard deviation between trainings."""

    values: list[float]
    se: float
    sd: float = 0.0


def margin(a: Sample, b: Sample) -> float:
    """How far a and b must be apart to be told apart."""
    n = len(a.values)
    if n > 1:
        differences = [x - y for x, y in zip(a.values, b.values)]
        return STUDENT_T.get(n, 2.5) * stdev(differences) / sqrt(n)
    return 2 * sqrt(a.se**2 + b.se**2 + a.sd**2 + b.sd**2)


def verdict(difference: float, margin: float, relation: str) -> str:
    if relation == "as good":
        return REPRODUCED if difference >= -margin else NOT
    if relation != "better":
        raise ValueError(f"relation must be 'better' or 'as good', got {relation!r}.")
    return REPRODUCED if difference > margin else NOT if difference < -margin else TIE


@dataclass
class Claim:
    """`a` and `b` pick what is compared from the results; `paper` are the paper's two figures."""

    id: str
    text: str
    paper: tuple[float, float]
    relation: str
    a: Callable[[dict], Sample]
    b: Callable[[dict], Sample]


# --- What is compared -----------------------------------------------------------------------------------------------

FREE = {"seed", "expert_code", "expert_math", "expert_lang", "soup", "btm"}  # of any training of the combination


class NotFinished(Exception):
    """A method that a claim is about has no results yet."""


def rated(results: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    table = results[part] if part == "methods" else results["cross"][part]
    if name not in table:
        raise NotFinished(name)
    return table[name]


def chance(results: dict[str, Any], name: str, of: str = "") -> float:
    """The standard deviation between trainings: of the average, or of a domain.

    That of sums stands in for the cross task's, which is not measured.
    """
    if name in FREE:
        return 0.0
    return results["repeats"]["domains"].get(of, 0.0) if of else results["repeats"]["sd"]


def main(name: str) -> Callable[[dict], Sample]:
    def pick(results: dict) -> Sample:
        result = rated(results, "methods", name)
        return Sample(result["average"]["values"], result["se"], chance(results, name))

    return pick


def domain(name: str, of: str) -> Callable[[dict], Sample]:
    def pick(results: dict) -> Sample:
        result = rated(results, "methods", name)["domains"][of]
        return Sample(result["score"]["values"], result["se"], chance(results, name, of))

    return pick


def cross(name: str) -> Callable[[dict], Sample]:
    def pick(results: dict) -> Sample:
        result = rated(results, "cross_steps", name)
        return Sample(result["average"]["values"], result["se"], chance(results, name, "math"))

    return pick


def cross_untrained(name: str) -> Callable[[dict], Sample]:
    def pick(results: dict) -> Sample:
        result = rated(results, "methods", name)["cross_untrained"]["cross_steps"]
        return Sample(result["exact"]["values"], result["se"], chance(results, name, "math"))

    return pick


def better(id: str, text: str, paper: tuple[float, float], a, b) -> Claim:
    return Claim(id, text, paper, "better", a, b)


def as_good(id: str, text: str, paper: tuple[float, float], a, b) -> Claim:
    return Claim(id, text, paper, "as good", a, b)


CLAIMS = [
    # Table 3
    better("bts_over_seed", "BTS beats the seed on average", (28.1, 24.0), main("bts"), main("seed")),
    better("bts_over_soup", "BTS beats the model soup on average", (28.1, 25.7), main("bts"), main("soup")),
    better("bts_over_btm", "BTS beats BTM on average", (28.1, 26.9), main("bts"), main("btm")),
    better("bts_over_routing", "BTS beats expert routing on average", (28.1, 24.8), main("bts"), main("routing")),
    better("bts_over_btx_sample", "BTS beats BTX Sample on average", (28.1, 25.7), main("bts"), main("btx_sample")),
    better("bts_over_btx_soft", "BTS beats BTX Soft on average", (28.1, 27.4), main("bts"), main("btx_soft")),
    better("bts_over_bam", "BTS beats BAM adapters on average", (28.1, 27.3), main("bts"), main("bam_adapters")),
    as_good("keeps_code", "BTS is as good at code as the code expert (MBPP)", (32.2, 32.0),
            domain("bts", "code"), domain("expert_code", "code")),
    as_good("keeps_math", "BTS is as good at maths as the maths expert (MATH)", (10.6, 10.1),
            domain("bts", "math"), domain("expert_math", "math")),
    better("short_of_lang", "The language expert stays better at its language than BTS (FLORES source)", (31.9, 30.9),
           domain("expert_lang", "lang"), domain("bts", "lang")),
    # Tables 4, 9, 6 and 7
    better("cross_over_seed", "Cross capability: BTS beats the seed", (16.0, 12.8), cross("bts"), cross("seed")),
    better("cross_over_dense", "Cross capability: BTS beats the seed trained on the same data", (16.0, 14.0),
           cross("bts"), cross("dense")),
    better("cross_over_bam", "Cross capability: BTS beats BAM adapters, frozen experts too", (16.0, 15.6),
           cross("bts"), cross("bam_adapters")),
    better("cross_btx_over_bts", "Cross capability: BTX Soft, which trains everything, beats BTS", (17.6, 16.0),
           cross("btx_soft"), cross("bts")),
    better("cross_alternating", "Cross capability: alternating stitches beat Experts-into-Hub only", (16.0, 11.6),
           cross("bts"), cross("bts_experts_into_hub")),
    as_good("cross_needs_data", "Cross capability without in-domain data: BTS does not beat the seed", (12.8, 10.0),
            cross_untrained("seed"), cross_untrained("bts")),
    # Tables 5, 6, 8
    better("four_over_one", "4 stitches beat 1 on average", (28.1, 27.0), main("bts"), main("bts_k1")),
    as_good("four_enough", "4 stitches are as good as many (paper: 10 of 20 layers; here every layer)", (28.1, 28.1),
            main("bts"), main("bts_kL")),
    as_good("into_hub_only", "Experts-into-Hub only is as good as alternating on average", (28.4, 28.1),
            main("bts_experts_into_hub"), main("bts")),
    better("seed_as_hub", "The seed is a better hub than the maths expert", (28.1, 26.2), main("bts"),
           main("bts_hub_math")),
]  # fmt: skip


# --- Ours -----------------------------------------------------------------------------------------------------------


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdict on every claim whose results are there."""
    verdicts = []
    for judge_it in [*(partial(judge_one, claim) for claim in CLAIMS), judge_gates, judge_size]:
        with suppress(NotFinished):
            verdicts.append(judge_it(results))
    return verdicts


def judge_one(claim: Claim, results: dict[str, Any]) -> dict[str, Any]:
    a, b = claim.a(results), claim.b(results)
    m, difference = margin(a, b), mean(a.values) - mean(b.values)
    both_fail = max(*a.values, *b.values) < FLOOR
    return {
        "id": claim.id,
        "text": claim.text,
        "paper": list(claim.paper),
        "ours": [mean(a.values), mean(b.values)],
        "difference": difference,
        "margin": m,
        "verdict": TIE if both_fail else verdict(difference, m, claim.relation),
    }


def compare(results: dict[str, Any]) -> dict[str, Any]:
    """Every method's average against that of the paper's form: how far above it, the margin, and what that means."""
    bts, compared = main("bts")(results), {}
    for name in results["methods"]:
        other = main(name)(results)
        m, difference = margin(other, bts), mean(other.values) - mean(bts.values)
        outcome = "better" if difference > m else "worse" if difference < -m else "tie"
        compared[name] = {"difference": difference, "margin": m, "outcome": outcome}
    return compared


def judge_gates(results: dict[str, Any]) -> dict[str, Any]:
    """Figure 2: on its own domain, the fitting expert's gate is higher than on every other domain."""
    if not results["gates"]:
        raise NotFinished("gates")
    gates = results["gates"]["mean"]
    fitting = [e for e in ("code", "math", "lang") if max(gates, key=lambda domain: gates[domain][e]) == e]
    return {
        "id": "gates_fit",
        "text": "Figures 2 and 3: an expert's gate is highest on its own domain (experts of which it is true)",
        "paper": [3, 3],
        "ours": [len(fitting), 3],
        "difference": None,
        "margin": None,
        "verdict": REPRODUCED if len(fitting) == 3 else NOT,
    }


def judge_size(results: dict[str, Any]) -> dict[str, Any]:
    """Table 2: weights trained by BTS, and by BAM adapters, in percent of all weights."""
    bts, bam = (rated(results, "methods", name) for name in ("bts", "bam_adapters"))
    ours = [100 * m["trained_parameters"] / m["total_parameters"] for m in (bts, bam)]
    return {
        "id": "fewer_weights",
        "text": "Table 2: BTS trains a smaller share of all weights than BAM adapters (in %)",
        "paper": [100 * 0.264 / 11, 100 * 1.5 / 9.9],
        "ours": ours,
        "difference": ours[0] - ours[1],
        "margin": 0.0,
        "verdict": REPRODUCED if ours[0] < ours[1] else NOT,
    }
