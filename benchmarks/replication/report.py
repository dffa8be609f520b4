"""The results file, and the report: Markdown with a verdict on every claim, tables, and plots. Nothing is typed in."""

from pathlib import Path
from typing import Any

from ..reporting import table, write_results
from .data import DOMAINS, TASKS
from .figures import draw_all
from .methods import TITLES
from .presets import FOURTH


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write `path` (JSON), the report beside it (.md), and its plots in a folder of the same name."""
    write_results(results, path)
    figures = draw_all(results, path.with_suffix(""))
    parts = [head(results), claims(results), main_table(results, figures), variants(results), sequences(results)]
    optional = {"removal": removal, "addition": addition, "cost": costs}
    parts += [cross(results), *(section(results) for key, section in optional.items() if results[key])]
    parts += [gates(results, figures)] if results["gates"] else []
    path.with_suffix(".md").write_text("\n\n".join([*parts, facts(results), setup(results)]) + "\n")


def figure(spread: dict[str, Any], digits: int = 1) -> str:
    """Mean, and ± standard deviation over sets."""
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd}"


def head(results: dict[str, Any]) -> str:
    verdicts = [claim["verdict"] for claim in results["claims"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("reproduced", "tie", "not reproduced"))
    sets = results["sets"]
    scope = (
        "One set of seed and experts: it tells what happened to these models, not what happens to models in general; "
        "no margin covers other seeds and experts."
        if sets == 1
        else f"{sets} independent sets of seed and experts: figures are means ± standard deviations, margins "
        "half the 95% confidence interval of a difference."
    )
    pieces = results["pieces"]
    if pieces["done"] < pieces["all"]:
        scope += f" **Unfinished: {pieces['done']} of {pieces['all']} pieces of work are done, the rest is left out.**"
    return (
        "# The paper's study, re-run\n\n"
        f"Written by `python -m benchmarks.replicate --preset {results['preset']}`; do not edit. "
        f"Branch-Train-Stitch, arXiv 2502.00075, with models of {results['settings']['seed_parameters'] / 1e6:.2g}M "
        f"parameters where the paper has 2.7B.\n\nOf {len(verdicts)} claims: **{counts}**. {scope}"
    )


def claims(results: dict[str, Any]) -> str:
    rows = []
    for claim in results["claims"]:
        pair = [" against ".join(f"{value:.3g}" for value in claim[key]) for key in ("paper", "ours")]
        difference = "" if claim["difference"] is None else f"{claim['difference']:+.1f}"
        margin = "" if claim["margin"] is None else f"{claim['margin']:.1f}"
        rows.append([claim["text"], *pair, difference, margin, f"**{claim['verdict']}**"])
    return (
        "## Claim by claim\n\n"
        "A difference larger than its margin counts; a smaller one is a tie, or, where the claim is that one is *as "
        f"good* as the other, what was claimed. {chance(results)}\n\n"
        + table(["claim", "paper", "ours", "difference", "margin", "verdict"], rows)
    )


def chance(results: dict[str, Any]) -> str:
    trainings, sd = results["repeats"]["trainings"], results["repeats"]["sd"]
    if trainings == 1:
        return (
            "How much chance there is in a training is not measured yet; margins cover the choice of test data alone."
        )
    return (
        f"Training the paper's form {trainings} times with its data in other orders gave averages with a standard "
        f"deviation of {sd:.1f}."
    )


METHOD_HEAD = ["method", "trained weights", *DOMAINS.values(), "average", "to BTS", "learning rate"]


def method_row(name: str, results: dict[str, Any]) -> list[str]:
    result, to_bts = results["methods"][name], results["to_bts"][name]
    trained = f"{result['trained_parameters'] / 1e3:,.0f}k" if result["trained_parameters"] else "-"
    scores = [figure(result["domains"][domain]["score"]) for domain in DOMAINS]
    difference = "" if name == "bts" else f"{to_bts['difference']:+.1f}, {to_bts['outcome']}"
    rates = ", ".join(sorted({f"{rate:g}" for rate in result["learning_rates"]}))
    return [TITLES[name], trained, *scores, f"**{figure(result['average'])}**", difference, rates]


def main_table(results: dict[str, Any], figures: dict[str, str]) -> str:
    names = [name for name in results["methods"] if not name.startswith("bts_")]
    errors = [result["se"] for result in results["methods"].values()]
    settings = results["settings"]
    tokens = settings["steps"] * settings["batch"] * settings["length"]
    return (
        "## All methods (table 3)\n\n"
        "In percent: next tokens that are right for docstrings and code, answers right to the letter for "
        f"{' and '.join(DOMAINS[task] for task in TASKS)}. Every trained method saw the same {tokens:,} tokens in "
        "the same order, and had the same learning rates to choose from, on validation data: "
        f"{', '.join(f'{rate:g}' for rate in settings['learning_rates'])}. The choice of test data makes a standard "
        f"error of {min(errors):.1f} to {max(errors):.1f} in the averages. *To BTS*: the difference of averages, and "
        "whether it exceeds the margin.\n\n"
        + table(METHOD_HEAD, [method_row(name, results) for name in names])
        + f"\n\n![averages]({figures['averages']})"
    )


def variants(results: dict[str, Any]) -> str:
    rows, ratios = [], results["cost"].get("ratios")
    for name in (name for name in results["methods"] if name.startswith("bts")):
        time = ratios and ratios[name]["seconds_per_step"] / ratios["bts"]["seconds_per_step"]
        rows.append([*method_row(name, results), f"{time:.2f}" if time else ""])
    return (
        "## Variants of BTS (tables 5, 6 and 8, and ours)\n\n"
        f"Against the paper's form (`StitchConfig`'s defaults). {chance(results)}\n\n"
        + table([*METHOD_HEAD, "time per step, BTS = 1"], rows)
    )


def sequences(results: dict[str, Any]) -> str:
    rows = [
        [TITLES[name], figure(r["switching_bits"], 2), figure(r["three"]["exact"]), figure(r["three"]["code"])]
        for name, r in results["methods"].items()
    ]
    return (
        "## Several domains in one sequence\n\n"
        "Bits per token on test sequences whose second half is of another domain (all ordered pairs; lower is "
        "better). Three at once: a translation, a piece of code and a sum in one sequence; *both answers* right to "
        "the letter, and next tokens of the code that are right, in percent. No method was trained on such "
        "sequences, beyond documents of one domain following one another.\n\n"
        + table(["method", "switching, bits per token", "three at once: both answers", "three at once: code"], rows)
    )


def cross(results: dict[str, Any]) -> str:
    direct, steps, long = (results["cross"][key] for key in ("cross_direct", "cross_steps", "cross_direct_long"))
    settings = results["settings"]
    rows = []
    for name in steps:
        columns = [figure(study[name]["average"]) if name in study else "" for study in (direct, long, steps)]
        rows.append([TITLES[name], *columns])
    untrained = results["methods"]["bts"]["cross_untrained"]
    return (
        "## Cross capability (tables 4, 6, 7 and 9)\n\n"
        "Maths in the second language: `tricent kvardek sep plus ok =`, with the answer at once (*direct*: `5530`, "
        "units first) or with the sum written in digits before it (*in steps*: `347+8=5530`). Language and maths "
        f"experts, {settings['cross_items']:,} different training items, {settings['cross_steps']} steps, and "
        f"{results['cross_long_factor']} times as many for *direct, longer*. Exact answers in percent. Seed, "
        "experts, soup and BTM are not trained on it.\n\n"
        + table(["method", "direct", "direct, longer", "in steps"], rows)
        + "\n\nWithout any in-domain data, the main table's BTS gets "
        f"{figure(untrained['cross_direct']['exact'])} (direct) and {figure(untrained['cross_steps']['exact'])} (in "
        "steps): it cannot know the format."
    )


def removal(results: dict[str, Any]) -> str:
    rows = []
    everything = {
        "nothing": results["methods"]["bts"],
        **results["removal"],
        "all (the seed)": results["methods"]["seed"],
    }
    for name, result in everything.items():
        rows.append([name, *(figure(result["domains"][d]["score"]) for d in DOMAINS), figure(result["average"])])
    return (
        "## An expert removed, without training\n\n"
        "The trained BTS with one expert detached; the gates' softmax renormalises.\n\n"
        + table(["removed", *DOMAINS.values(), "average"], rows)
    )


def addition(results: dict[str, Any]) -> str:
    rows = []
    for init, steps in results["addition"].items():
        for part, title in (("new", "Roman numerals"), ("old", "mean of the old domains")):
            rows.append([f'`init="{init}"`', title, *(figure(rated[part]) for rated in steps.values())])
    steps = list(next(iter(results["addition"].values())))
    return (
        "## A fourth expert added\n\n"
        f'An expert for Roman numerals ("{FOURTH}"), a task that neither seed nor stitches had met, attached '
        "to the trained BTS; the stitches are then trained on all five domains alike, at the learning rate of BTS, "
        "constant.\n\n"
        + table(["start of its gates", "exact or token, %", *(f"{step} steps" for step in steps)], rows)
    )


def costs(results: dict[str, Any]) -> str:
    ratios, seed = results["cost"]["ratios"], results["cost"]["seed"]

    def ratio(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.2f}" if key in row else "-"

    keys = ["seconds_per_step", "step_flops", "step_bytes", "tokens_per_second", "forward_flops", "forward_bytes"]
    rows = []
    for name, row in ratios.items():
        counts = [f"{row['parameters'][kind] / 1e3:,.0f}k" for kind in ("trained", "total", "active")]
        counts[0] = "-" if row["parameters"]["trained"] == 0 else counts[0]
        rows.append([TITLES[name], *counts, *(ratio(row, key) for key in keys)])
    return (
        "## What it costs (table 2, and what the paper leaves out)\n\n"
        "Parameters, and ratios to the seed (in training: to training all of the seed). A step is forward, backward "
        "and update; inference is a forward of whole sequences. Memory counts weights, optimizer and all tensors "
        f"alive at the peak. The seed itself: {seed['tokens_per_second']:,.0f} tokens/s, "
        f"{seed['forward_flops'] / 1e6:.1f} MFLOPs per token (matrix products and attention), forward. "
        "Times hold for this machine and what else it did; compare small differences by FLOPs.\n\n"
        + table(["method", "trained", "total", "active", "time per step", "FLOPs per step", "memory of a step",
                 "tokens/s", "FLOPs per token", "memory of inference"], rows)
    )  # fmt: skip


def gates(results: dict[str, Any], figures: dict[str, str]) -> str:
    gates = results["gates"]
    rows = [[DOMAINS[d], *(f"{gates['mean'][d][model]:.2f}" for model in gates["models"])] for d in DOMAINS]
    return (
        "## Gates of the last stitch (figures 2 and 3)\n\n"
        "Mean over channels and test tokens, first set:\n\n"
        + table(["domain", *gates["models"]], rows)
        + f"\n\nOne test sequence of each domain:\n\n![gates, one sequence of each domain]({figures['prompts']})"
        + f"\n\nOne sequence through all domains:\n\n![gates, switching]({figures['switching']})"
    )


# (what, our earlier figures, the results' names, which figure): from one earlier set at 0.4M tokens; to check.
EARLIER = [
    ("identity start, torch's start, start as the seed (average)", "55, 30, 45 at 120 steps",
     ["bts", "bts_init_torch", "bts_init_near_seed"], "average"),
    ("BTS, BTM, routing, BTX Soft, dense, soup (average)", "62.9, 62.1, 62.2, 30.5, 24.2, 11.8",
     ["bts", "btm", "routing", "btx_soft", "dense", "soup"], "average"),
    ("BTS, BTM, routing (bits per token on switching sequences)", "2.7, 3.4, 4.0",
     ["bts", "btm", "routing"], "switching_bits"),
]  # fmt: skip


def facts(results: dict[str, Any]) -> str:
    rows = []
    for text, earlier, names, key in EARLIER:
        digits = 2 if key == "switching_bits" else 1
        known = [results["methods"].get(name) for name in names]
        rows.append([text, earlier, ", ".join(figure(method[key], digits) if method else "?" for method in known)])
    return (
        "## An earlier, smaller study of ours\n\n"
        "One set, no validation split, easier sums: orders should agree, figures need not.\n\n"
        + table(["what", "then", "now"], rows)
    )


def setup(results: dict[str, Any]) -> str:
    settings = results["settings"]
    branch = ", ".join(f"{name} {steps}" for name, (steps, _) in settings["branch"].items())
    mix = ", ".join(f"{DOMAINS[domain]} {100 * share:.0f}%" for domain, share in settings["mix"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        "## How it was made\n\n"
        f"- Steps of branching, {settings['batch']} sequences of {settings['length']} tokens each: {branch}.\n"
        f"- Data that combinations are trained on (the paper's shares): {mix}. {settings['layers']} layers; K = 4.\n"
        "- Training: AdamW, warm-up, cosine to 1%; the learning rate with the best validation average was tested, "
        "once.\n"
        "- Routing decides after the prompt, or after the first quarter of a text without one, whose tokens count "
        "too.\n"
        f"- {results['pieces']['done']} pieces of work, {results['core_minutes']:.0f} core minutes (processor time), "
        f"on {results['machine']}, Python {results['python']}, {versions}, commit {results['commit']}."
    )
