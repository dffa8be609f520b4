"""The page's plots."""

import re
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


COLOURS = {"prefill": "#1f77b4", "decode": "#d62728", "training": "#2ca02c"}
AXES = {"experts": "experts", "stitches": "stitches, K", "width": "width", "length": "tokens"}


def draw_all(rows: dict, folder: Path) -> dict[str, str]:
    """Write a figure for every section that has one; their paths from the page, by section."""
    figures = {}
    for section in ("prefill", "decode"):
        if section in rows:
            figures[section] = ratios(rows[section], "stitched / E", limit=1.06)
    if "training" in rows:
        row = next(iter(rows["training"].values()))
        figures["training"] = bars(row["seconds"], "seconds of a step")
    if rows.get("dropping"):
        figures["dropping"] = ratios(rows["dropping"], "dropped / E", limit=None)
    if "scaling" in rows:
        figures["scaling"] = scaling(rows["scaling"])
    if peaks := {
        name: row["peak_bytes"] / 2**20 for name, row in rows.get("memory", {}).items() if "peak_bytes" in row
    }:
        figures["memory"] = bars(peaks, "rise of memory, MiB")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
    return {name: f"{folder.name}/{name}.png" for name in figures}


def bars(values: dict[str, float], label: str) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(values) + 0.8))
    shown = axes.barh(list(values)[::-1], list(values.values())[::-1], color="#9db8d2")
    axes.bar_label(shown, fmt="%.3g", padding=3, fontsize=8)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ratios(rows: dict, ratio: str, limit: float | None) -> plt.Figure:
    """Medians with quartiles, and where they should be."""
    found = {name: row["ratios"][ratio] for name, row in reversed(rows.items()) if ratio in row.get("ratios", ())}
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(found) + 0.9))
    medians = [value["median"] for value in found.values()]
    errors = [[v["median"] - v["low"] for v in found.values()], [v["high"] - v["median"] for v in found.values()]]
    axes.errorbar(medians, list(found), xerr=errors, fmt="o", color="#1f77b4", capsize=3)
    axes.axvline(1, color="black", lw=0.7)
    if limit is not None:
        axes.axvline(limit, color="#d62728", lw=0.9, ls="--", label=f"target {limit}")
        axes.legend(fontsize=8)
    axes.set_xlabel(ratio)
    axes.margins(y=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scaling(rows: dict) -> plt.Figure:
    """A panel per size: the cost in E, and the base case in each."""
    points: dict[tuple[str, str], list] = {}
    for name, row in rows.items():
        if match := re.fullmatch(r"(\w+) = (\d+), (\w+)", name):
            size, value, kind = match.groups()
            points.setdefault((size, kind), []).append((int(value), row["ratios"]["stitched / E"]))
    figure, grid = plt.subplots(1, len(AXES), figsize=(12, 3), layout="constrained")
    for axes, (size, label) in zip(grid, AXES.items()):
        for kind, colour in COLOURS.items():
            if kind == "training" and size != "stitches":
                continue
            line = sorted(points.get((size, kind), []), key=lambda point: point[0])
            if line:
                x, y = zip(*line)
                low, high = zip(*((v["median"] - v["low"], v["high"] - v["median"]) for v in y))
                axes.errorbar(x, [v["median"] for v in y], yerr=[low, high], label=kind, color=colour, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("stitched / E")
    grid[1].legend(fontsize=8)
    return figure
