"""The results file as a page: targets, tables, plots. Nothing is typed in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reporting import table
from .figures import draw_all


TITLES = {
    "prefill": (
        "Prefill",
        "One forward over a prompt. E: one forward of the plain hub and one of each expert without its lm_head.",
    ),
    "decode": (
        "Decoding",
        "One token at a time behind a prompt, with a `DynamicCache`, by a greedy loop written by hand. Seconds are of "
        "all decoded tokens of a round.",
    ),
    "training": (
        "A training step",
        "Forward, backward and AdamW of the stitches, against training all models in full, and a LoRA (r=8, all "
        "linear layers) on the hub alone.",
    ),
    "plain": (
        "A plain loop",
        "The paper's appendix B in plain PyTorch, every layer of every model called in turn. Its logits are checked "
        "to be the same before it is timed.",
    ),
    "streams": (
        "Parallel streams",
        "All models' layers between two stitches at once: `parallel_streams()`, two threads on a CPU; and stacked, "
        "with `stack=True`, where experts also decode as one batch.",
    ),
    "dropping": ("Dropping experts", "Decoding with at most k experts (`max_active_experts`), in one sequence."),
    "compiled": ("Compiled decoding", "Static cache, one graph per step; on a GPU, CUDA graphs."),
    "scaling": ("One size at a time", "Around the base case; E is that of the same sizes."),
    "memory": (
        "Memory",
        "Each in a process of its own: how far memory rises above what it holds once the models are there, over two "
        "forwards or training steps of {} x {} tokens; the models themselves; and the seconds of the second.",
    ),
    "attaching": ("Attaching and loading", "One expert attached, in a process of its own."),
    "sizes": (
        "Memory, files and loading by number of experts and K",
        "Each in a process of its own; MiB that a forward and a training step need beside the models, and of the "
        "adapter file; seconds to attach one loaded model, and to load the adapter with its experts, and the experts "
        "alone.",
    ),
}


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page beside the results file, its plots in a folder of the same name."""
    figures, rows = draw_all(results, path.with_suffix("")), results["rows"]
    tables = {"memory": memory, "attaching": attaching, "sizes": sizes}
    parts = [head(results["settings"]), targets(rows)]
    for section, (title, text) in TITLES.items():
        if section in rows:
            text = text.format(*results["settings"]["sizes"]["training"])
            parts += [f"## {title}", text, tables.get(section, timed)(rows[section])]
            parts += [f"![{section}]({figures[section]})"] if section in figures else []
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def head(settings: dict[str, Any]) -> str:
    case, versions = settings["case"], ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    where = settings["machine"] if case["device"] != "cpu" else f"{settings['machine']}, {settings['threads']} threads"
    return (
        "# What stitching costs\n\n"
        f"Written by `python -m benchmarks.speed --preset {settings['preset']}`; do not edit. {where}; {versions}.\n\n"
        f"Models of random weights: hub and {case['experts']} experts of Llama shape, width {case['width']}, "
        f"{case['layers']} layers, {case['heads']} heads, FFN {case['intermediate']}, vocabulary "
        f"{case['vocabulary']:,}, {case['dtype']}; K={case['stitches']}. Whatever is compared took turns; a ratio is "
        "the median over rounds of the ratio within a round, quartiles in brackets. The timed process keeps memory "
        "that it has freed (`keep_freed_memory`)."
    )


# --- Targets --------------------------------------------------------------------------------------------------------


def target_values(rows: dict) -> list[tuple[str, float, float | None]]:
    """What is asked, at most how much, and what was found (the worst row; `None`: not measured)."""

    def worst(section: str, ratio: str) -> float | None:
        found = [row["ratios"][ratio] for row in rows.get(section, {}).values() if ratio in row.get("ratios", ())]
        return max((spread["median"] for spread in found), default=None)

    def worst_of_best_stream() -> float | None:
        """Of the decoding rows, each in the better of the ways to run it."""
        found = [row.get("ratios", {}) for name, row in rows.get("streams", {}).items() if name.startswith("decode")]
        in_E = [[v["median"] for name, v in ratios.items() if name.endswith(" / E")] for ratios in found]
        return max(map(min, filter(None, in_E)), default=None)

    def memory_ratio(one: str, other: str) -> float | None:
        peaks = [rows.get("memory", {}).get(name, {}).get("peak_bytes") for name in (one, other)]
        return None if None in peaks else peaks[0] / peaks[1]

    def attaching_rise(name: str) -> float | None:
        """In the expert's size, without the stitch weights that come with it."""
        row = rows.get("attaching", {}).get(name)
        return row and max(0, row["peak_bytes"] - row["stitch_bytes"]) / row["expert_bytes"]

    into_hub = '`pattern="experts_into_hub"`, in'
    return [
        ("prefill, in E", 1.06, worst("prefill", "stitched / E")),
        ("sequential decoding, in E", 1.06, worst("decode", "stitched / E")),
        ("decoding with parallel streams, in E", 0.70, worst_of_best_stream()),
        (
            "decoding with experts dropped, in (hub + kept experts)",
            1.2,
            worst("dropping", "dropped / hub + kept experts"),
        ),
        ("training step, in full training", 0.55, worst("training", "alternating / full training")),
        (f"training step, {into_hub} full training", 0.40, worst("training", "experts_into_hub / full training")),
        (
            f"peak memory of a training step, {into_hub} alternating",
            0.7,
            memory_ratio("training, experts_into_hub", "training, alternating"),
        ),
        ("attaching a loaded model: rise of memory, in its size", 0.1, attaching_rise("attach, a loaded model")),
        ("attaching a path: peak of memory, in the expert's size", 1.2, attaching_rise("attach, from a path")),
    ]


def targets(rows: dict) -> str:
    lines = []
    for text, limit, value in target_values(rows):
        verdict = "not measured" if value is None else "**met**" if value <= limit else "**not met**"
        lines.append([text, f"{limit:.2f}", "" if value is None else f"{value:.3f}", verdict])
    return "## Targets\n\nThe worst row counts.\n\n" + table(["", "at most", "measured", ""], lines)


# --- Tables ---------------------------------------------------------------------------------------------------------


def timed(rows: dict[str, dict]) -> str:
    """Rows with their ratios, and the seconds behind them; more columns where a section has more."""
    ratios = list(dict.fromkeys(name for row in rows.values() for name in row.get("ratios", ())))
    extras = [
        ("largest_difference", "largest difference of logits", lambda row: f"{row['largest_difference']:.0e}"),
        ("same_tokens", "same tokens", lambda row: "yes" if row["same_tokens"] else "no"),
        ("flops", "TFLOP/s", lambda row: each(row["flops"], lambda n, v: f"{v / row['seconds'][n] / 1e12:.3g}")),
        ("flops", "by operations alone", lambda row: each(flop_ratios(row), lambda _, v: f"{v:.3f}")),
        (
            "share_of_bandwidth",
            "of the bandwidth limit",
            lambda row: each(row["share_of_bandwidth"], lambda n, v: f"{v:.0%}"),
        ),
        ("out_of_memory", "out of memory", lambda row: ", ".join(row["out_of_memory"])),
    ]
    shown = [extra for extra in extras if any(extra[0] in row for row in rows.values())]
    lines = []
    for name, row in rows.items():
        found = row.get("ratios", {})
        cells = [interval(found[ratio]) if ratio in found else "" for ratio in ratios]
        cells.append(each(row.get("seconds", {}), lambda _, v: f"{v:.4g}"))
        cells += [show(row) if key in row else "" for key, _, show in shown]
        lines.append([name, *cells, row.get("rounds", 0)])
    return table(["", *ratios, "seconds", *(title for _, title, _ in shown), "rounds"], lines)


def flop_ratios(row: dict) -> dict[str, float]:
    """What the ratios would be if time were floating point operations of matrix products, which are counted."""
    pairs = {ratio: ratio.split(" / ") for ratio in row["ratios"]}
    return {ratio: row["flops"][a] / row["flops"][b] for ratio, (a, b) in pairs.items()}


def each(values: dict[str, float], show: Callable[[str, float], str]) -> str:
    return "; ".join(f"{name} {show(name, value)}" for name, value in values.items())


def interval(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.3f}** ({ratio['low']:.3f} to {ratio['high']:.3f})"


def mib(row: dict, key: str, digits: int = 0) -> str:
    return f"{row[key] / 2**20:,.{digits}f}" if key in row else "out of memory"


def memory(rows: dict[str, dict]) -> str:
    lines = [
        [name, mib(row, "peak_bytes"), mib(row, "model_bytes"), f"{row.get('seconds', math.nan):.3g}"]
        for name, row in rows.items()
    ]
    return table(["", "rise, MiB", "models, MiB", "seconds"], lines)


def attaching(rows: dict[str, dict]) -> str:
    lines = [
        [name, f"{row['seconds']:.3g}", mib(row, "peak_bytes"), mib(row, "expert_bytes"), mib(row, "stitch_bytes", 1),
         f"{row['peak_bytes'] / row['expert_bytes']:.2f}"]
        for name, row in rows.items()
        if name.startswith("attach")
    ]  # fmt: skip
    titles = ["", "seconds", "memory rises, MiB", "expert, MiB", "its stitch weights, MiB", "rise / expert"]
    text = table(titles, lines)
    if load := rows.get("load, adapter and experts"):
        both, alone = load["seconds"]["adapter and experts"], load["seconds"]["experts alone"]
        text += (
            f"\n\nThe adapter file has {mib(load, 'file_bytes', 1)} MiB. `PeftModel.from_pretrained` loads it with "
            f"its experts in {both:.3g} s; the experts alone take `AutoModelForCausalLM` {alone:.3g} s."
        )
    return text


def sizes(rows: dict[str, dict]) -> str:
    lines = []
    for name, row in rows.items():
        parts = (("inference", "peak_bytes"), ("training", "peak_bytes"), ("load", "file_bytes"))
        loaded = row["load"].get("seconds", {})
        seconds = [row["attach"].get("seconds"), *(loaded.get(of) for of in ("adapter and experts", "experts alone"))]
        shown = ["out of memory" if value is None else f"{value:.3g}" for value in seconds]
        lines.append([name, *(mib(row[part], key, 1) for part, key in parts), *shown])
    titles = ["", "forward", "training step", "adapter file", "attach, s", "load all, s", "experts alone, s"]
    return table(titles, lines)
