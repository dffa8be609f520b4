"""The results file as a page: targets, tables, plots. Nothing is typed in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..random_models import PATTERNS
from ..reporting import table
from . import fresh, lora, processes, rows
from .figures import draw_all


SECTIONS = rows.SECTIONS | lora.SECTIONS | processes.SECTIONS | fresh.SECTIONS
MIB = 2**20


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page beside the results file, its plots in a folder of the same name."""
    figures, measured = draw_all(results, path.with_suffix("")), results["rows"]
    tables = {"memory": memory, "attaching": attaching, "sizes": sizes}
    parts = [head(**results["settings"]), targets(measured)]
    for section, (title, rows_of) in SECTIONS.items():
        if section in measured:
            text = " ".join(rows_of.__doc__.split())
            parts += [f"## {title}", text, tables.get(section, timed)(measured[section])]
            parts += [f"![{section}]({figures[section]})"] if section in figures else []
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def head(preset: str, threads: int, machine: str, versions: dict, case: dict, sizes: dict) -> str:
    where = machine if case["device"] != "cpu" else f"{machine}, {threads} threads"
    return (
        "# What stitching costs\n\n"
        f"Written by `python -m benchmarks.speed --preset {preset}`; do not edit. {where}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.\n\n"
        f"Models of random weights: hub and {case['experts']} experts of Llama shape, width {case['width']}, "
        f"{case['layers']} layers, {case['heads']} heads, FFN {case['intermediate']}, vocabulary "
        f"{case['vocabulary']:,}, {case['dtype']}; K={case['stitches']}. Memory is measured with "
        f"{' x '.join(map(str, sizes['training']))} tokens. Whatever is compared took turns; a ratio is the median "
        "over rounds of the ratio within a round, quartiles in brackets. The timed process keeps memory that it has "
        "freed (`keep_freed_memory`)."
    )


# --- Targets --------------------------------------------------------------------------------------------------------


def target_values(rows: dict) -> list[tuple[str, float, float | None]]:
    """What is asked, at most how much, and what was found (the worst row; `None`: not measured)."""

    def worst(section: str, ratio: str, prefix: str = "") -> float | None:
        """Of rows whose names begin with `prefix`; in a row, the best of the ratios that end with `ratio` counts."""
        found = [row.get("ratios", {}) for name, row in rows.get(section, {}).items() if name.startswith(prefix)]
        medians = [[spread["median"] for name, spread in row.items() if name.endswith(ratio)] for row in found]
        return max(map(min, filter(None, medians)), default=None)

    def rise(name: str) -> float | None:
        """In the expert's size, without the stitch weights that come with it."""
        row = rows.get("attaching", {}).get(name)
        return row and max(0, row["peak_bytes"] - row["stitch_bytes"]) / row["expert_bytes"]

    def peaks(kind: str, other: str, how: str = "") -> float | None:
        """Of two kinds of training steps."""
        memory = rows.get("memory", {})
        one, two = (memory.get(f"training, {name}{how}", {}).get("peak_bytes") for name in (kind, other))
        return one / two if one and two else None

    pattern = '`pattern="experts_into_hub"`, in'
    return [
        ("prefill, in E", 1.06, worst("prefill", "stitched / E")),
        ("sequential decoding, in E", 1.06, worst("decode", "stitched / E")),
        ("decoding 1 sequence, LoRA experts, in E", 0.45, worst("lora", "stitched / E", prefix="decode, 1 sequence")),
        (
            "decoding 4 sequences, LoRA experts, in E",
            0.55,
            worst("lora", "stitched / E", prefix="decode, 4 sequences"),
        ),
        ("prefill, LoRA experts, in E", 1.05, worst("lora", "stitched / E", prefix="prefill")),
        ("decoding with parallel streams, in E", 0.70, worst("streams", " / E", prefix="decode")),
        ("decoding with experts dropped, in (hub + kept experts)", 1.2, worst("dropping", "/ hub + kept experts")),
        ("training step, in full training", 0.55, worst("training", "alternating / full training")),
        (f"training step, {pattern} full training", 0.40, worst("training", "experts_into_hub / full training")),
        (f"peak memory of a training step, {pattern} alternating", 0.7, peaks(*PATTERNS[::-1])),
        ("training step of output gates alone, in E'", 1.1, worst("mixture", "/ E'", prefix="training")),
        (
            'peak memory of a training step, vocabulary of 128,000, `output="mixture"`, in `output="hub"`',
            1.2,
            peaks("mixture", "alternating", ", vocabulary of 128000"),
        ),
        ("two processes: decoding, in E", 0.65, worst("processes", "two processes / E", prefix="decode")),
        ("two processes: prefill, in E", 1.0, worst("processes", "two processes / E", prefix="prefill")),
        (
            "two processes: training step, in that of one",
            1.0,
            worst("processes", "two processes / one process", prefix="training"),
        ),
        ("attaching a loaded model: rise of memory, in its size", 0.1, rise("attach, a loaded model")),
        ("attaching a path: peak of memory, in the expert's size", 1.2, rise("attach, from a path")),
        ("attaching a LoRA's path: peak of memory, in the LoRA's size", 1.2, rise("attach, a LoRA of the hub")),
    ]


def targets(rows: dict) -> str:
    lines = []
    for text, limit, value in target_values(rows):
        verdict = "not measured" if value is None else "**met**" if value <= limit else "**not met**"
        lines.append([text, f"{limit:.2f}", "" if value is None else f"{value:.3f}", verdict])
    return "## Targets\n\nThe worst row counts.\n\n" + table(["", "at most", "measured", ""], lines)


# --- Tables ---------------------------------------------------------------------------------------------------------

Columns = dict[str, tuple[str, Callable[[dict], Any]]]  # by title: what a row must have, and the cell made of the row


def table_of(rows: dict[str, dict], columns: Columns) -> str:
    """A line for every row, without the columns that no row has."""
    shown = {title: column for title, column in columns.items() if any(column[0] in row for row in rows.values())}
    lines = [[name, *(cell(row) if key in row else "" for key, cell in shown.values())] for name, row in rows.items()]
    return table(["", *shown], lines)


def timed(rows: dict[str, dict]) -> str:
    """Rows with their ratios, and what is behind them."""
    ratios = dict.fromkeys(ratio for row in rows.values() for ratio in row.get("ratios", ()))
    columns: Columns = {ratio: ("ratios", partial(interval, ratio)) for ratio in ratios} | {
        "seconds": ("seconds", lambda row: each(row["seconds"], ".4g")),
        "largest difference of logits": ("largest_difference", lambda row: f"{row['largest_difference']:.0e}"),
        "same tokens": ("same_tokens", lambda row: "yes" if row["same_tokens"] else "no"),
        "TFLOP/s": (
            "flops",
            lambda row: each({name: v / row["seconds"][name] / 1e12 for name, v in row["flops"].items()}, ".3g"),
        ),
        "by operations alone": ("flops", lambda row: each(flop_ratios(row), ".3f")),
        "of the bandwidth limit": ("share_of_bandwidth", lambda row: each(row["share_of_bandwidth"], ".0%")),
        "sent per token, KiB": number("sent_per_token", ",.1f", 2**10),
        "by formula": number("formula_per_token", ",.1f", 2**10),
        "on the wire": number("wire_per_token", ",.1f", 2**10),
        "FSDP would send, KiB": number("fsdp_per_token", ",.0f", 2**10),
        "left out": ("left_out", lambda row: row["left_out"]),
        "out of memory": ("out_of_memory", lambda row: ", ".join(row["out_of_memory"])),
        "rounds": ("rounds", lambda row: row["rounds"]),
    }
    return table_of(rows, columns)


def interval(ratio: str, row: dict) -> str:
    found = row["ratios"].get(ratio)
    return f"**{found['median']:.3f}** ({found['low']:.3f} to {found['high']:.3f})" if found else ""


def each(values: dict[str, float], form: str) -> str:
    return "; ".join(f"{name} {value:{form}}" for name, value in values.items())


def flop_ratios(row: dict) -> dict[str, float]:
    """What the ratios would be if time were floating point operations of matrix products, which are counted."""
    pairs = {ratio: ratio.split(" / ") for ratio in row["ratios"]}
    return {ratio: row["flops"][a] / row["flops"][b] for ratio, (a, b) in pairs.items()}


def number(key: str, form: str, unit: float = 1) -> tuple[str, Callable[[dict], str]]:
    return key, lambda row: f"{row[key] / unit:{form}}"


def memory(rows: dict[str, dict]) -> str:
    columns: Columns = {
        "rise, MiB": number("peak_bytes", ",.0f", MIB),
        "models, MiB": number("model_bytes", ",.0f", MIB),
        "seconds": number("seconds", ".3g"),
        "out of memory": ("out_of_memory", lambda row: "yes"),
    }
    return table_of(rows, columns)


def attaching(rows: dict[str, dict]) -> str:
    columns: Columns = {
        "seconds": number("seconds", ".3g"),
        "memory rises, MiB": number("peak_bytes", ",.0f", MIB),
        "expert, MiB": number("expert_bytes", ",.0f", MIB),
        "its stitch weights, MiB": number("stitch_bytes", ",.1f", MIB),
        "rise / expert": ("expert_bytes", lambda row: f"{row['peak_bytes'] / row['expert_bytes']:.2f}"),
    }
    text = table_of({name: row for name, row in rows.items() if name.startswith("attach")}, columns)
    if load := rows.get("load, adapter and experts"):
        both, alone = load["seconds"]["adapter and experts"], load["seconds"]["experts alone"]
        text += (
            f"\n\nThe adapter file has {load['file_bytes'] / MIB:,.1f} MiB. `PeftModel.from_pretrained` loads it with "
            f"its experts in {both:.3g} s; the experts alone take `AutoModelForCausalLM` {alone:.3g} s."
        )
    return text


def sizes(rows: dict[str, dict]) -> str:
    columns: Columns = {
        "forward": number("inference peak_bytes", ",.1f", MIB),
        "training step": number("training peak_bytes", ",.1f", MIB),
        "adapter file": number("load file_bytes", ",.1f", MIB),
        "attach, s": number("attach seconds", ".3g"),
        "load all, s": ("load seconds", lambda row: f"{row['load seconds']['adapter and experts']:.3g}"),
        "experts alone, s": ("load seconds", lambda row: f"{row['load seconds']['experts alone']:.3g}"),
    }
    flat = {
        name: {f"{part} {key}": value for part, found in row.items() if part != "took" for key, value in found.items()}
        for name, row in rows.items()
    }
    return table_of(flat, columns)
