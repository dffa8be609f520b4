"""The report's first page: what to use when."""

from typing import Any

from ...reporting import table
from ..methods.registry import TITLES, is_ours
from ..work.presets import FORMS, SIMPLE
from .cells import (
    GOALS,
    Results,
    cross_names,
    cross_title,
    everywhere,
    figure,
    interval,
    on_the_same_sets,
    outcome,
    weights,
)


# What a part of a form adds: the form, and the same without it.
STITCHES = [
    ("bts_outputs", "outputs"),
    ("bts_token_r8_outputs", "outputs"),
    ("bts_outputs_evidence", "outputs_evidence"),
]
EVIDENCE = [("outputs_evidence", "outputs"), ("bts_outputs_evidence", "bts_outputs")]
MIXED_TRAINING = [("outputs_switches", "outputs"), ("bts_outputs_switches", "bts_outputs")]


def bits(results: Results, name: str, on: str) -> float:
    return results["methods"][name]["bits_per_byte"][on]["mean"]


def best_of(results: Results, names: tuple[str, ...], on: str) -> str | None:
    """The one with the fewest bits per byte among those that were tested on all sets."""
    there = [name for name in everywhere(results) if name in names]
    return min(there, key=lambda name: bits(results, name, on)) if there else None


def between(results: Results, ours: str, baseline: str, on: str, figure: str = "bits_per_byte") -> Any:
    for row in results["paired"]:
        if (row["ours"], row["baseline"], row["on"], row["figure"]) == (ours, baseline, on, figure):
            return row
    return None


def summary(results: Results) -> str:
    return f"## In one page\n\n{advice(results)}\n\n{small_table(results)}"


def advice(results: Results) -> str:
    """What to use when, what it gains over the best simple way, and what it costs; and where a simple way wins."""
    lines = []
    for on, what in GOALS.items():
        ours, simple = best_of(results, FORMS, on), best_of(results, others(results), on)
        row = between(results, ours, simple, on) if ours and simple else None
        if not (ours and simple and row):
            continue
        both = [
            f"{bits(results, name, on):.3f} with {TITLES[name]} ({cost(results['methods'][name], results, name)})"
            for name in (ours, simple)
        ]
        lines.append(
            f"- For {what}: {choice(row)}. Bits per byte: {both[0]}; {both[1]}, the best of the others. "
            f"Difference {interval(row)}, {set_count(row)}."
        )
    lines += cross_advice(results)
    parts = {"stitches add": STITCHES, "evidence adds": EVIDENCE, "training on mixed documents adds": MIXED_TRAINING}
    for part, pairs in parts.items():
        for on, what in GOALS.items():
            rows = [row for pair in pairs if (row := between(results, *pair, on))]
            if rows:
                lines.append(f"- What {part} on {what}, in bits per byte: {'; '.join(map(added, rows))}.")
    lines.append(simple_wins(results))
    return "\n".join(lines)


def others(results: Results) -> tuple[str, ...]:
    """All methods that are not ours, and choose without knowing the text."""
    return tuple(name for name in results["methods"] if not is_ours(name) and not name.startswith("oracle"))


def choice(row: dict[str, Any]) -> str:
    ours, simple = TITLES[row["ours"]], TITLES[row["baseline"]]
    return {
        "better": f"use **{ours}**",
        "worse": f"a simple way wins: use **{simple}**",
        "not told apart": f"**{ours}** and **{simple}** cannot be told apart: take the cheaper one",
    }[outcome(row)]


def cross_advice(results: Results) -> list[str]:
    """Of the cross task: our best form against the best of all others, for few steps, for many, and from few items."""
    lines = []
    for on, part in sorted(cross_names(results).items()):
        found = on_the_same_sets(results["cross"][part])
        by_bits = sorted(found, key=lambda name: found[name]["bits_per_byte"]["mean"])
        ours, other = next(filter(is_ours, by_bits), None), next((name for name in by_bits if not is_ours(name)), None)
        row = between(results, ours, other, on) if ours and other else None
        if not (ours and other and row):
            continue
        both = [
            f"{found[name]['bits_per_byte']['mean']:.3f} with {TITLES[name]} ({found[name]['average']['mean']:.1f}% "
            f"right, {cost(found[name])})"
            for name in (ours, other)
        ]
        lines.append(
            f"- For tasks that need two experts at once (word problems in French, {cross_title(results, part)}): "
            f"{choice(row)}. Bits per byte: {both[0]}; {both[1]}, the best of the others that were run. Difference "
            f"{interval(row)}, {set_count(row)}.{overtrained(found[other])}"
        )
    return lines


def overtrained(row: dict[str, Any]) -> str:
    """Of a rival whose bits on validation items have risen again: that the comparison is not with it at its best."""
    means = {float(share): spread["mean"] for share, spread in row.get("curve", {}).items()}
    if not means or means[max(means)] <= min(means.values()):
        return ""
    best = min(means, key=lambda share: means[share])
    return (
        f" The latter was better before the end ({means[best]:.3f} on validation items after {100 * best:.0f}% of the "
        f"steps, {means[max(means)]:.3f} in the end): with fewer steps it would come closer."
    )


def set_count(row: dict[str, Any]) -> str:
    return f"{row['sets']} set" + "s" * (row["sets"] != 1)


def added(row: dict[str, Any]) -> str:
    """A paired difference in words."""
    names = f"{TITLES[row['ours']]} against {TITLES[row['baseline']]}"
    return f"{names} {interval(row)}, {set_count(row)}, {outcome(row)}"


WHERE = {
    "average": "the average of the domains",
    "mixed": "mixed text",
    "tasks": "tasks",
    "cross": "the cross task",
    "cross_long": "the cross task with more steps",
    "cross_few": "the cross task with fewer training items",
}


def simple_wins(results: Results) -> str:
    """Each method that is not ours with the forms that it beats, in a list by where."""
    beaten: dict[str, dict[str, list[str]]] = {}
    for row in results["paired"]:
        if not is_ours(row["baseline"]) and outcome(row) == "worse":
            where = f"{WHERE[row['on']]}, {'right answers' if row['figure'] == 'exact' else 'bits per byte'}"
            beaten.setdefault(where, {}).setdefault(TITLES[row["baseline"]], []).append(TITLES[row["ours"]])
    if not beaten:
        return "- Nowhere, in what was measured, is a form of ours beaten by another method."
    lines = [
        f"  - {where}: " + "; ".join(f"{name} beats {listed(forms)}" for name, forms in found.items())
        for where, found in beaten.items()
    ]
    return "\n".join(["- Where a form of ours is beaten by another method:", *lines])


def listed(titles: list[str]) -> str:
    """Names, of which some have commas."""
    return " and ".join(f"*{title}*" for title in titles)


def cost(row: dict[str, Any], results: Results | None = None, name: str = "") -> str:
    """How many weights are trained, and time and FLOPs if the results have them."""
    ratios = results["cost"].get("ratios", {}).get(name, {}) if results else {}
    count = weights(row)
    parts = ["nothing trained" if count == "-" else f"{count} weights trained"]
    parts += [
        text.format(ratios[key])
        for key, text in {
            "seconds_per_step": "a step of training takes {:.1f} times one of training the seed",
            "forward_flops": "a token the FLOPs of {:.1f} forwards of the seed",
        }.items()
        if key in ratios
    ]
    return ", ".join(parts)


def small_table(results: Results) -> str:
    ratios = results["cost"].get("ratios", {})
    rows = []
    for name in ("seed", *SIMPLE, *FORMS, "oracle_document", "oracle_token"):
        if name in results["methods"]:
            row, cost = results["methods"][name], ratios.get(name, {})
            flops = f"{cost['forward_flops']:.1f}" if "forward_flops" in cost else ""
            rows.append([TITLES[name], *(figure(row["bits_per_byte"][on]) for on in GOALS),
                         figure(row.get("average"), 1), weights(row), flops])  # fmt: skip
    head = ["", "bits per byte", "on mixed text", "right answers, %", "trained weights", "FLOPs per token, seed = 1"]
    return table(head, rows)
