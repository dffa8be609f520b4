"""The results file, and the report: Markdown with one page to act on first, then tables and plots.

No figure is typed in.
"""

import json
from pathlib import Path

from ...reporting import table, write_results
from ..methods.registry import TITLES, form_of, is_ours
from ..text.corpora import DOMAINS, MIXED
from ..text.tasks import CROSS, TASKS
from ..work.earlier import runs_of
from ..work.material import PROTOCOLS
from ..work.presets import FORMS, SHARES, SIMPLE
from .advice import between, summary
from .cells import (
    CROSS_HEADS,
    GOALS,
    Results,
    cross_rows,
    cross_table,
    cross_title,
    everywhere,
    figure,
    interval,
    on_the_same_sets,
    outcome,
    rates,
    weights,
)
from .cells import sets as sets_of
from .plots import draw_all
from .predictions import predictions


def write_report(results: Results, path: Path) -> None:
    """Write `path` (JSON), the report beside it (.md), and its plots in a folder of the same name."""
    write_results(results, path)
    results = json.loads(path.read_text())  # as rounded there: pages that quote the file say the same
    figures = draw_all(results, path.with_suffix(""))
    parts = [
        head(results),
        summary(results),
        targets(results),
        main_table(results, figures),
        curves(results, figures),
        forgetting(results, figures),
        paired(results),
        tasks(results),
        *(cross(results, items) for items in results["cross"]),
        others(results),
        gates(results, figures),
        costs(results),
        claims(results),
        predictions(results),
        experts(results),
        setup(results),
    ]
    path.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n")


def head(results: Results) -> str:
    sets = results["sets"]
    scope = (
        "One set of seed and experts: intervals cover the choice of test data, not other seeds and experts."
        if sets == 1
        else f"{sets} independent sets of seed and experts. Intervals are the middle 95% of what a figure was when "
        "sets and documents were drawn again. Drawn from few sets they are too narrow, and with one or two sets they "
        "say next to nothing of other models; of hundreds of differences, some are called better or worse by chance."
    )
    left = [f"{part} ({done} of {all_})" for part, (done, all_) in results["pieces"]["parts"].items() if done < all_]
    if left:
        scope += f" **Unfinished parts (pieces of work that are done): {', '.join(left)}.**"
    rates = results["settings"]["rates"]
    scope += " Each method had one learning rate, nothing was chosen." if rates == 1 else ""
    return (
        "# Which way of combining experts to use\n\n"
        f"Written by `python -m benchmarks.replicate --preset {results['preset']}`; do not edit. Real text, models of "
        f"{results['settings']['size']} parameters; how it is made: [README](../replication/README.md). {scope}"
    )


def targets(results: Results) -> str:
    rows = []
    for target in results["targets"]:
        met = {True: "yes", False: "no", None: "not known"}[target["met"]]
        missed = "; ".join(TITLES[name] for name in target["not_beaten"])
        by = "; ".join(TITLES.get(name, name) for name in (target["by"] or "").split(", "))
        rows.append([target["text"], f"**{met}**", by, missed])
    return "## What was hoped for\n\n" + table(["target", "met", "by", "not beaten"], rows, left=4)


# --- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Results, figures: dict[str, str]) -> str:
    rows = []
    for name, row in everywhere(results).items():
        domains = [f"{row['domains'][domain]['bits_per_byte']['mean']:.3f}" for domain in DOMAINS]
        kinds = [f"{row['mixed'][kind]['bits_per_byte']['mean']:.3f}" for kind in MIXED]
        averages = [f"**{figure(row['bits_per_byte'][on])}**" for on in GOALS]
        rows.append([TITLES[name], weights(row), *domains, averages[0], *kinds, averages[1]])
    return (
        "## All methods, bits per byte\n\nOn test text; lower is better. Oracles choose knowing the text: no choice "
        "among the models can do better than the best per token, but a mixture of them can.\n\n"
        + table(["method", "trained weights", *DOMAINS, "average", *MIXED, "mixed, average"], rows)
        + f"\n\n![bits per byte]({figures['bits']})"
        + elsewhere(results)
    )


def elsewhere(results: Results) -> str:
    """Methods that were not run on all sets: their differences to a form of ours on the same sets."""
    rows = []
    for name in results["methods"].keys() - everywhere(results).keys():
        form = form_of(name)
        pair = (name, form) if is_ours(name) else (form, name)
        found = [between(results, *pair, on) for on in GOALS]
        if all(found):
            row = results["methods"][name]["bits_per_byte"]
            rows.append([TITLES[name], weights(results["methods"][name]), sets_of(results["methods"][name]),
                         *(figure(row[on]) for on in GOALS), " less ".join(TITLES[one] for one in pair),
                         *map(interval, found)])  # fmt: skip
    if not rows:
        return ""
    order = list(TITLES.values())
    rows.sort(key=lambda row: order.index(row[0]))
    return (
        "\n\nThe following were run on fewer sets, or on those of another run, and sets differ more than methods do. "
        "So look at the differences, which are within the same sets and documents; with one set, the intervals say "
        "nothing about other models.\n\n"
        + table(["method", "trained weights", "sets", "bits per byte", "on mixed text", "difference", "average",
                 "mixed text"], rows)
    )  # fmt: skip


def curves(results: Results, figures: dict[str, str]) -> str:
    if not any("curve" in row for row in results["methods"].values()):
        return ""
    return (
        "## Who gets where how fast\n\nBits per byte on validation text. The router by sequence is trained in passes, "
        "and looked at once. Methods on other sets are of other models: by how much they differ stands above. *: the "
        "lowest or highest of the rates that were tried. †: not tried, but what an earlier run had chosen for the "
        f"method, or for the form that it is a variant of.\n\n{looks(results['methods'])}\n\n"
        f"![learning curves]({figures['curves']})"
    )


def looks(methods: Results) -> str:
    """Learning curves as a table."""
    heads = [f"after {100 * share:.0f}% of the steps" for share in SHARES]
    rows = [
        [TITLES[name], sets_of(row), rates(row), *(figure(row["curve"].get(f"{share:g}")) for share in SHARES)]
        for name, row in methods.items()
        if "curve" in row
    ]
    return table(["method", "sets", "learning rate", *heads], rows)


def forgetting(results: Results, figures: dict[str, str]) -> str:
    rows = [[factor, *(figure(row[on]) for on in GOALS)] for factor, row in results["forgetting"].items()]
    if not rows:
        return ""
    return (
        "## BTM by its factor of forgetting\n\nBTM weighs the models by how well they have predicted the text; what a "
        "token told counts this much less with every token after it. Bits per byte on test text: the best factor is "
        "known here, where a user would have to choose one.\n\n"
        + table(["factor", "bits per byte", "on mixed text"], rows)
        + f"\n\n![both goals at once]({figures['forgetting']})"
    )


def paired(results: Results) -> str:
    rows = [
        [TITLES[row["ours"]], TITLES[row["baseline"]], row["on"], row["figure"].replace("_", " "),
         row["sets"], interval(row, 3 if row["figure"] == "bits_per_byte" else 1), outcome(row)]
        for row in results["paired"]
    ]  # fmt: skip
    return (
        "## Paired differences\n\nOur main forms against everything else, and their variants. Differences within a "
        "set and document. Fewer bits per byte and "
        "more right answers (\"exact\", in percent) are better.\n\n"
        + table(["ours", "against", "on", "figure", "sets", "difference (95%)", "ours is"], rows, left=4)
    )  # fmt: skip


def tasks(results: Results) -> str:
    exact = [task for task in (*TASKS, CROSS) if task not in TASKS or TASKS[task].metric == "exact"]
    rows = [
        [TITLES[name], sets_of(row), *(figure(row["tasks"][task]["alone"], 1) for task in exact)]
        for name, row in results["methods"].items()
        if "tasks" in row
    ]
    return (
        "## Tasks\n\nAnswers that are right to the letter, in percent, asked alone. Rows of other sets are of other "
        f"models, whose maths experts differ most. {CROSS}: nobody was trained on them here.\n\n"
        + table(["method", "sets", *exact], rows, left=2)
        + prompts(results)
    )


def prompts(results: Results) -> str:
    """Both protocols, of the sets that were asked both ways."""
    if not results["prompts"]:
        return ""
    rows = []
    for name, found in results["prompts"].items():
        cells = []
        for task, row in found.items():
            scores = row.get("chrf", {}) if task in TASKS and TASKS[task].metric == "chrf" else row
            cells.append(" / ".join(f"{scores[way]['mean']:.1f}" for way in PROTOCOLS if way in scores) or "-")
        rows.append([TITLES[name], *cells])
    sets = max(row["four"]["n"] for found in results["prompts"].values() for row in found.values())
    return (
        "\n\nThe same questions asked alone / behind four solved examples, and chrF of written translations (French "
        f"and German). Sets: {sets}{', of the last run' * (len(runs_of(results)) > 1)}.\n\n"
        + table(["method", *TASKS, CROSS], rows)
    )


def cross(results: Results, items: str) -> str:
    found = results["cross"][items]
    fewer = {name: row for name, row in found.items() if name not in on_the_same_sets(found)}
    page = (
        f"## Cross capability: word problems in French, {cross_title(results, items)}\n\nFrench and maths experts. "
        "Answers right to the letter, in percent, and bits per byte of the answers. Seed, experts, soup and BTM are "
        "not trained on them. *: the lowest or highest rate tried. †: chosen by an earlier run.\n\n"
        f"{cross_table(results, items)}\n\nBits per byte on validation items, on the way there:\n\n"
        f"{looks(found)}"
    )
    if fewer:
        page += '\n\nOn other sets, so of other models; their differences stand under "Paired differences":\n\n'
        page += table(CROSS_HEADS, cross_rows(fewer))
    return page


def others(results: Results) -> str:
    """Other experts and other sizes."""
    parts = {"experts trained as LoRAs": results["lora"]}
    sizes = {size: methods for size, methods in results["sizes"].items() if methods}
    if len(sizes) > 1:
        parts |= {f"{size} parameters": methods for size, methods in sizes.items()}
    rows = []
    for what, methods in parts.items():
        for name, row in methods.items():
            if not what.endswith("parameters") or name in ("seed", *SIMPLE, *FORMS):
                bits = [figure(row["bits_per_byte"][on]) for on in GOALS]
                rows.append([what, TITLES[name], sets_of(row), rates(row), *bits])
    if not rows:
        return ""
    return (
        "## Other experts, other sizes\n\nDo the differences grow or shrink? In bits per byte, within a set and "
        "document. Columns of one run are of the same text, and of seeds that were trained alike.\n\n"
        f"{gap_table(results)}\n\n"
        + table(["models", "method", "sets", "learning rate", "bits per byte", "on mixed text"], rows, left=3)
    )


def gap_table(results: Results) -> str:
    """A line for each difference, a column for each kind of models."""
    gaps = {what: rows for what, rows in results["gaps"].items() if rows}
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for what, rows in gaps.items():
        for row in rows:
            lines.setdefault((row["on"], row["ours"], row["baseline"]), {})[what] = interval(row)
    heads = [f"{what} (sets: {rows[0]['sets']})" for what, rows in gaps.items()]
    return table(["on", "ours", "against", *heads], [
        [on, TITLES[ours], TITLES[other], *(cells.get(what, "") for what in gaps)]
        for (on, ours, other), cells in lines.items()
    ], left=3)  # fmt: skip


def gates(results: Results, figures: dict[str, str]) -> str:
    if not results["gates"]:
        return ""
    return (
        "## Whom they listen to\n\nMean gates of the output mixture, or of the last stitch where outputs are not "
        "mixed, on validation text of each domain.\n\n"
        f"![mean gates by domain]({figures['gates']})\n\nHow fast they turn: the gates of the old domain's model and "
        "of the new one's, around the first token of the new domain, where test documents switch in their middle.\n\n"
        f"![gates around a change of domain]({figures['turn']})"
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
    return (
        "## Costs\n\nRatios to the seed; in training, to training all of it, which was also measured against itself: "
        "its row shows how noisy times are.\n\n" + table(["method", *heads], rows)
    )


def claims(results: Results) -> str:
    rows = []
    for claim in results["claims"]:
        digits = 3 if claim["figure"] == "bits_per_byte" else 1
        ours = " against ".join(f"{value:.{digits}f}" for value in claim["ours"])
        paper = " against ".join(f"{value:.3g}" for value in claim["paper"])
        apart = "" if claim["low"] is None else interval(claim, digits)
        rows.append([claim["text"], paper, ours, apart, claim["sets"] or "", f"**{claim['verdict']}**"])
    if not rows:
        return ""
    heads = ["claim", "paper", "ours", "difference (95%)", "sets", "verdict"]
    return (
        "## The paper's claims\n\nThe paper's figures are scores in percent; ours are bits per byte (lower is "
        "better), and right answers in percent on word problems in French. A claim that one is *as good* holds "
        "unless the interval says that it is worse.\n\n" + table(heads, rows)
    )


def experts(results: Results) -> str:
    rows = [
        [
            what,
            name,
            figure(row["to_seed"]),
            ", ".join(map(str, row["trainings"])),
            f"{row['learned']} of {row['to_seed']['n']}",
        ]
        for what, trained in results["trained_of"].items()
        for name, row in trained.items()
    ]
    return (
        "## Experts\n\nBits per byte on their own domain's validation text, over the seed's. One that has not learned "
        "its domain by its threshold is trained again, up to three times; the last one is taken, learned or not.\n\n"
        + table(["models", "expert", "over the seed's", "trainings, by set", "learned"], rows, left=2)
    )


def setup(results: Results) -> str:
    settings = results["settings"]
    stages = ", ".join(f"{name} {steps}" for name, (steps, _) in settings["stages"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ", ".join(f"{name} {sets}" for name, sets in settings["parts"].items())
    rates = (
        f"Three learning rates or more on {settings['tuned_sets']} set(s), the best by validation text taken on all."
        if settings["rates"] == 3
        else "One learning rate for each method."
    )
    return (
        "## How it was made\n\n"
        f"- Steps of {settings['batch']} blocks of 256 tokens: {stages}; combinations {settings['steps']}, cross task "
        f"{settings['cross_steps']}. Every trained method saw the same blocks in the same order.\n"
        f"- {rates}\n- Sets by part, where it is finished: {parts}.\n"
        f"{earlier_runs(results)}"
        f"- {results['core_minutes']:.0f} core minutes (processor time) so far, on {results['machine']}, Python "
        f"{results['python']}, {versions}; reported by commit {results['commit']}, pieces made by "
        f"{', '.join(results['commits'])}."
    )


def earlier_runs(results: Results) -> str:
    """Of a run that goes on from others: which, and what that means."""
    runs = runs_of(results)
    if len(runs) == 1:
        return ""
    each = "; ".join(
        f"run {number}: reported by commit {run['commit']}, {run['core_minutes']:.0f} core minutes, torch "
        f"{run['versions']['torch']}"
        for number, run in enumerate(runs, 1)
    )
    return (
        f"- Figures of {len(runs)} runs, each of which went on from the results file of the one before, with its "
        "learning rates. Their models differ, and are never pooled: of each figure the one over more sets is given, "
        f"and differences are always within one run. {each}.\n"
    )
