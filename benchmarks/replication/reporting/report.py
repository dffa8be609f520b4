"""The results file, and the report: Markdown with one page to act on first, then tables and plots.

No figure is typed in.
"""

from pathlib import Path
from typing import Any

from ...reporting import table, write_results
from ..methods.registry import TITLES
from ..text.corpora import DOMAINS, MIXED
from ..text.tasks import CROSS, TASKS
from ..work.presets import FORMS, SHARES, SIMPLE
from .plots import draw_all


Results = dict[str, Any]
GOALS = {"average": "the average of the domains", "mixed": "mixed text"}


def write_report(results: Results, path: Path) -> None:
    """Write `path` (JSON), the report beside it (.md), and its plots in a folder of the same name."""
    write_results(results, path)
    figures = draw_all(results, path.with_suffix(""))
    parts = [head(results), summary(results), targets(results), main_table(results, figures), curves(results, figures)]
    parts += [paired(results), tasks(results), *(cross(results, items) for items in results["cross"])]
    parts += [others(results), costs(results), claims(results), experts(results), setup(results)]
    path.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n")


def figure(spread: dict[str, Any] | None, digits: int = 3) -> str:
    """Mean, and ± standard deviation over sets; nothing, where there is none."""
    if spread is None:
        return ""
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd}"


def weights(row: dict[str, Any]) -> str:
    count = row.get("trained_parameters", 0)
    return "-" if not count else f"{count:,}" if count < 10_000 else f"{count / 1e3:,.0f}k"


def head(results: Results) -> str:
    sets, pieces = results["sets"], results["pieces"]
    scope = (
        "One set of seed and experts: intervals cover the choice of test data, not other seeds and experts."
        if sets == 1
        else f"{sets} independent sets of seed and experts. Intervals are the middle 95% of what a figure was when "
        "sets and documents were drawn again."
    )
    if pieces["done"] < pieces["all"]:
        scope += f" **Unfinished: {pieces['done']} of {pieces['all']} pieces of work are done, the rest is left out.**"
    rates = results["settings"]["rates"]
    scope += " Each method had one learning rate, nothing was chosen." if rates == 1 else ""
    return (
        "# Which way of combining experts to use\n\n"
        f"Written by `python -m benchmarks.replicate --preset {results['preset']}`; do not edit. Real text, models of "
        f"{results['settings']['size']} parameters; how it is made: [README](../replication/README.md). {scope}"
    )


# --- One page -------------------------------------------------------------------------------------------------------


def bits(results: Results, name: str, on: str) -> float:
    return results["methods"][name]["bits_per_byte"][on]["mean"]


def best_of(results: Results, names: tuple[str, ...], on: str) -> str | None:
    """The one with the fewest bits per byte among those that are there."""
    there = [name for name in names if name in results["methods"]]
    return min(there, key=lambda name: bits(results, name, on)) if there else None


def between(results: Results, ours: str, baseline: str, on: str, figure: str = "bits_per_byte") -> Any:
    for row in results["paired"]:
        if (row["ours"], row["baseline"], row["on"], row["figure"]) == (ours, baseline, on, figure):
            return row
    return None


def outcome(row: dict[str, Any]) -> str:
    favours_ours = row["high"] < 0 if row["figure"] == "bits_per_byte" else row["low"] > 0
    favours_theirs = row["low"] > 0 if row["figure"] == "bits_per_byte" else row["high"] < 0
    return "better" if favours_ours else "worse" if favours_theirs else "not told apart"


def interval(row: dict[str, Any], digits: int = 3) -> str:
    low, high = (f"{row[bound]:+.{digits}f}" for bound in ("low", "high"))
    return f"{row['difference']:+.{digits}f} ({low} to {high})"


def summary(results: Results) -> str:
    return f"## In one page\n\n{advice(results)}\n\n{small_table(results)}"


def advice(results: Results) -> str:
    """What to use when, what it gains over the best simple way, and what it costs; and where a simple way wins."""
    lines = []
    for on, what in GOALS.items():
        ours, simple = best_of(results, FORMS, on), best_of(results, SIMPLE, on)
        row = between(results, ours, simple, on) if ours and simple else None
        if not (ours and simple and row):
            continue
        verdict = {
            "better": f"use **{TITLES[ours]}**",
            "worse": f"a simple way wins: use **{TITLES[simple]}**",
            "not told apart": f"**{TITLES[ours]}** and {TITLES[simple]} cannot be told apart: take the cheaper one",
        }[outcome(row)]
        lines.append(
            f"- For {what}: {verdict}. {TITLES[ours]} takes {bits(results, ours, on):.3f} bits per byte, the best "
            f"simple way, {TITLES[simple]}, {bits(results, simple, on):.3f}; difference {interval(row)}. "
            f"{weights(results['methods'][ours])} weights are trained{time(results, ours)}."
        )
    for on, what in GOALS.items():
        rows = [between(results, name, "outputs", on) for name in FORMS if name != "outputs"]
        rows = [row for row in rows if row]
        if rows:
            best = min(rows, key=lambda row: row["difference"])
            lines.append(
                f"- What stitches add to output gates alone, on {what}: {TITLES[best['ours']]} is "
                f"{outcome(best).replace('apart', 'apart from them')}, {interval(best)} bits per byte."
            )
    lines.append(f"- Where a simple way wins against a form of ours: {simple_wins(results)}.")
    return "\n".join(lines)


def simple_wins(results: Results) -> str:
    """Each of `SIMPLE` with the forms that it beats, and where."""
    beaten: dict[tuple[str, str], list[str]] = {}
    for row in results["paired"]:
        if row["baseline"] in SIMPLE and outcome(row) == "worse":
            where = row["on"] + (", right answers" if row["figure"] == "exact" else ", bits")
            beaten.setdefault((row["baseline"], where), []).append(TITLES[row["ours"]])
    parts = [f"{TITLES[name]} ({where}) against {', '.join(forms)}" for (name, where), forms in beaten.items()]
    return "; ".join(parts) or "nowhere, in what was measured"


def time(results: Results, name: str) -> str:
    ratio = results["cost"].get("ratios", {}).get(name, {}).get("seconds_per_step")
    return f", and a step takes {ratio:.1f} times one of training the seed" if ratio else ""


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


def targets(results: Results) -> str:
    rows = []
    for target in results["targets"]:
        met = {True: "yes", False: "no", None: "not known"}[target["met"]]
        missed = ", ".join(TITLES[name] for name in target["not_beaten"])
        by = ", ".join(TITLES.get(name, name) for name in (target["by"] or "").split(", "))
        rows.append([target["text"], f"**{met}**", by, missed])
    return "## What was hoped for\n\n" + table(["target", "met", "by", "not beaten"], rows, left=4)


# --- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Results, figures: dict[str, str]) -> str:
    rows = []
    for name, row in results["methods"].items():
        domains = [f"{row['domains'][domain]['bits_per_byte']['mean']:.3f}" for domain in DOMAINS]
        kinds = [f"{row['mixed'][kind]['bits_per_byte']['mean']:.3f}" for kind in MIXED]
        averages = [f"**{figure(row['bits_per_byte'][on])}**" for on in GOALS]
        n = row["bits_per_byte"]["average"]["n"]
        rows.append([TITLES[name], n, weights(row), *domains, averages[0], *kinds, averages[1]])
    return (
        "## All methods, bits per byte\n\nOn test text; lower is better. Oracles choose knowing the text: no choice "
        "among the models can do better than the best per token, but a mixture of them can.\n\n"
        + table(["method", "sets", "trained weights", *DOMAINS, "average", *MIXED, "mixed, average"], rows)
        + f"\n\n![bits per byte]({figures['bits']})"
    )


def curves(results: Results, figures: dict[str, str]) -> str:
    shares = [f"{share:g}" for share in SHARES]
    rows = []
    for name, row in results["methods"].items():
        if "curve" in row:
            rates = ", ".join(sorted({f"{rate:g}" for rate in row["learning_rates"]}))
            rows.append([TITLES[name], rates, *(figure(row["curve"].get(share)) for share in shares)])
    if not rows:
        return ""
    heads = [f"after {100 * share:.0f}% of the steps" for share in SHARES]
    return (
        "## Who gets where how fast\n\nBits per byte on validation text. The router by sequence is trained in passes, "
        "and looked at once.\n\n"
        + table(["method", "learning rates taken", *heads], rows)
        + f"\n\n![learning curves]({figures['curves']})"
    )


def paired(results: Results) -> str:
    rows = [
        [TITLES[row["ours"]], TITLES[row["baseline"]], row["on"], row["figure"].replace("_", " "),
         interval(row, 3 if row["figure"] == "bits_per_byte" else 1), outcome(row)]
        for row in results["paired"]
    ]  # fmt: skip
    return (
        "## Our main forms against everything else\n\nDifferences within a set and document. Fewer bits per byte and "
        "more right answers (\"exact\", in percent) are better.\n\n"
        + table(["ours", "against", "on", "figure", "difference (95%)", "ours is"], rows, left=4)
    )  # fmt: skip


def tasks(results: Results) -> str:
    names = [name for name, row in results["methods"].items() if "tasks" in row]
    rows = []
    for name in names:
        found = results["methods"][name]["tasks"]
        cells = []
        for task in (*TASKS, CROSS):
            if task in TASKS and TASKS[task].metric == "chrf":
                cells.append(figure(found[task].get("chrf"), 1) or "-")
            else:
                four = found[task].get("four")
                cells.append(f"{found[task]['alone']['mean']:.1f} / {four['mean']:.1f}" if four else
                             f"{found[task]['alone']['mean']:.1f}")  # fmt: skip
        rows.append([TITLES[name], *cells])
    return (
        "## Tasks\n\nAnswers that are right to the letter, in percent, asked alone / behind four solved examples; "
        f"French and German: chrF of translations, asked alone. {CROSS}: nobody was trained on them here.\n\n"
        + table(["method", *TASKS, CROSS], rows)
    )


def cross(results: Results, items: str) -> str:
    rows = [
        [TITLES[name], weights(row), figure(row["average"], 1), figure(row["bits_per_byte"]), row["average"]["n"]]
        for name, row in results["cross"][items].items()
    ]
    return (
        f"## Cross capability: word problems in French, {items} training items\n\nFrench and maths experts. Answers "
        "right to the letter, in percent, and bits per byte of the answers. Seed, experts, soup and BTM are not "
        "trained on them.\n\n" + table(["method", "trained weights", "right, %", "bits per byte", "sets"], rows)
    )


def others(results: Results) -> str:
    """Other experts and other sizes."""
    parts = {"experts trained as LoRAs": results["lora"]}
    if len(results["sizes"]) > 1:
        parts |= {f"{size} parameters": methods for size, methods in results["sizes"].items()}
    rows = []
    for what, methods in parts.items():
        for name, row in methods.items():
            if not what.endswith("parameters") or name in ("seed", *SIMPLE, *FORMS):
                n = row["bits_per_byte"]["average"]["n"]
                rows.append([what, TITLES[name], n, *(figure(row["bits_per_byte"][on]) for on in GOALS)])
    if not rows:
        return ""
    return "## Other experts, other sizes\n\n" + table(
        ["models", "method", "sets", "bits per byte", "on mixed text"], rows, left=2
    )


def costs(results: Results) -> str:
    if not results["cost"]:
        return ""
    keys = ["seconds_per_step", "step_flops", "step_bytes", "forward_flops", "forward_bytes"]
    rows = [
        [TITLES[name], *(f"{row[key]:.2f}" if key in row else "-" for key in keys)]
        for name, row in results["cost"]["ratios"].items()
    ]
    heads = ["time per step", "FLOPs per step", "memory of a step", "FLOPs per token", "memory of inference"]
    return "## Costs\n\nRatios to the seed; in training, to training all of it.\n\n" + table(["method", *heads], rows)


def claims(results: Results) -> str:
    rows = []
    for claim in results["claims"]:
        digits = 3 if claim["figure"] == "bits_per_byte" else 1
        ours = " against ".join(f"{value:.{digits}f}" for value in claim["ours"])
        paper = " against ".join(f"{value:g}" for value in claim["paper"])
        rows.append([claim["text"], paper, ours, interval(claim, digits), f"**{claim['verdict']}**"])
    if not rows:
        return ""
    return (
        "## The paper's claims\n\nThe paper's figures are scores in percent; ours are bits per byte, of which fewer "
        "are better, and right answers in percent on the cross task. A claim that one is *as good* holds unless the "
        "interval says that it is worse.\n\n" + table(["claim", "paper", "ours", "difference (95%)", "verdict"], rows)
    )


def experts(results: Results) -> str:
    rows = [
        [
            name,
            figure(row["to_seed"]),
            ", ".join(map(str, row["trainings"])),
            f"{row['learned']} of {row['to_seed']['n']}",
        ]
        for name, row in results["trained"].items()
    ]
    return (
        "## Experts\n\nBits per byte on their own domain's validation text, over the seed's. One that has not learned "
        "its domain by its threshold is trained again, up to three times.\n\n"
        + table(["expert", "over the seed's", "trainings, by set", "learned"], rows)
    )


def setup(results: Results) -> str:
    settings = results["settings"]
    stages = ", ".join(f"{name} {steps}" for name, (steps, _) in settings["stages"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ", ".join(f"{name} {sets}" for name, sets in settings["parts"].items())
    rates = (
        f"Three learning rates on {settings['tuned_sets']} set(s), the best by validation text taken on all."
        if settings["rates"] == 3
        else "One learning rate for each method."
    )
    return (
        "## How it was made\n\n"
        f"- Steps of {settings['batch']} blocks of 256 tokens: {stages}; combinations {settings['steps']}, cross task "
        f"{settings['cross_steps']}. Every trained method saw the same blocks in the same order.\n"
        f"- {rates}\n- Sets by part: {parts}.\n"
        f"- {results['core_minutes']:.0f} core minutes (processor time) so far, on {results['machine']}, Python "
        f"{results['python']}, {versions}; reported by commit {results['commit']}, pieces made by "
        f"{', '.join(results['commits'])}."
    )
