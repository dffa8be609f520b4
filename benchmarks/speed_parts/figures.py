"""The page's plots."""

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporting import save_figures


COLOURS = {"prefill": "#1f77b4", "decode": "#d62728", "training": "#2ca02c"}
AXES = {"experts": "experts", "stitches": "stitches, K", "width": "width", "length": "tokens"}


@rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8})
def draw_all(results: dict, folder: Path) -> dict[str, str]:
    """Write a figure for every section that has one; their paths from the page, by section."""
    rows, settings, figures = results["rows"], results["settings"], {}
    for section, ratio, target in (
        ("prefill", "stitched / E", 1.06),
        ("decode", "stitched / E", 1.06),
        ("dropping", "dropped / E", None),
    ):
        if section in rows:
            figures[section] = ratios(rows[section], ratio, target)
    if "training" in rows:
        figures["training"] = bars(next(iter(rows["training"].values()))["seconds"], "seconds of a step")
    peaks = {name: row["peak_bytes"] / 2**20 for name, row in rows.get("memory", {}).items() if "peak_bytes" in row}
    if peaks:
        figures["memory"] = bars(peaks, "rise of memory, MiB")
    if "scaling" in rows:
        figures["scaling"] = scaling(rows["scaling"], settings)
    if "sizes" in rows:
        figures["sizes"] = sizes(rows["sizes"], settings)
    return save_figures(figures, folder)


def bars(values: dict[str, float], label: str) -> Figure:
    figure = Figure(figsize=(7, 0.3 * len(values) + 0.8))
    axes = figure.subplots()
    shown = axes.barh(list(values)[::-1], list(values.values())[::-1], color="#9db8d2")
    axes.bar_label(shown, fmt="%.3g", padding=3, fontsize=8)
    axes.set_xlabel(label)
    return figure


def ratios(rows: dict, ratio: str, target: float | None) -> Figure:
    """Medians with quartiles, and where they should be."""
    found = {name: row["ratios"][ratio] for name, row in reversed(rows.items()) if ratio in row.get("ratios", ())}
    figure = Figure(figsize=(7, 0.3 * len(found) + 0.9))
    axes = figure.subplots()
    medians, errors = with_errors(found.values())
    axes.errorbar(medians, list(found), xerr=errors, fmt="o", color="#1f77b4", capsize=3)
    axes.axvline(1, color="black", lw=0.7)
    if target is not None:
        axes.axvline(target, color="#d62728", lw=0.9, ls="--", label=f"target {target}")
        axes.legend()
    axes.set_xlabel(ratio)
    axes.margins(y=0.3)
    return figure


def with_errors(spreads) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles are below and above them."""
    medians = [s["median"] for s in spreads]
    return medians, [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]


def by_size(rows: dict, size: str, base: int | None, kind: str = "") -> dict[int, dict]:
    """The rows of `kind` by one size, in order: those called "<size> = <value>", and "base", whose value is `base`."""
    found = {}
    for name, row in rows.items():
        match = re.fullmatch(rf"(?:{size} = (\d+)|base){kind}", name)
        if match and (match[1] or base is not None):
            found[int(match[1] or base)] = row
    return dict(sorted(found.items()))


def label_sizes(axes: Axes, size: str, values: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), sorted(values))
    axes.minorticks_off()
    axes.set_xlabel(AXES[size])


def scaling(rows: dict, settings: dict) -> Figure:
    """A panel per size: the cost in E. The base case is a point in each."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    grid = figure.subplots(1, len(AXES))
    for axes, size in zip(grid, AXES):
        seen = set()
        for kind, colour in COLOURS.items():
            base = settings["case"].get(size, settings["sizes"]["prompt" if kind == "decode" else "length"])
            unchanged = kind == "training" and size not in ("experts", "stitches")  # not measured by these sizes
            points = by_size(rows, size, None if unchanged else base, f", {kind}")
            points = {value: row["ratios"]["stitched / E"] for value, row in points.items() if "ratios" in row}
            if points:
                medians, errors = with_errors(points.values())
                axes.errorbar([*points], medians, yerr=errors, label=kind, color=colour, marker="o", capsize=2)
            seen |= points.keys()
        label_sizes(axes, size, seen)
    grid[0].set_ylabel("stitched / E")
    grid[1].legend()
    return figure


def sizes(rows: dict, settings: dict) -> Figure:
    """Memory and the adapter file by number of experts and by K; the base case is a point in both panels."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, size in zip(grid, ("experts", "stitches")):
        points = by_size(rows, size, settings["case"][size])
        for label, what, key in (
            ("training step", "training", "peak_bytes"),
            ("forward", "inference", "peak_bytes"),
            ("adapter file", "load", "file_bytes"),
        ):
            found = {value: row[what][key] / 2**20 for value, row in points.items() if key in row[what]}
            axes.plot([*found], [*found.values()], marker="o", label=label)
        axes.set_yscale("log")
        label_sizes(axes, size, points.keys())
    grid[0].set_ylabel("MiB")
    grid[1].legend()
    return figure
