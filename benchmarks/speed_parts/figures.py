"""The page's plots."""

import re
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


COLOURS = {"prefill": "#1f77b4", "decode": "#d62728", "training": "#2ca02c"}
AXES = {"experts": "experts", "stitches": "stitches, K", "width": "width", "length": "tokens"}


def draw_all(results: dict, folder: Path) -> dict[str, str]:
    """Write a figure for every section that has one; their paths from the page, by section."""
    rows, figures = results["rows"], {}
    for section in ("prefill", "decode"):
        if section in rows:
            figures[section] = ratios(rows[section], "stitched / E", limit=1.06)
    if "training" in rows:
        row = next(iter(rows["training"].values()))
        figures["training"] = bars(row["seconds"], "seconds of a step")
    if rows.get("dropping"):
        figures["dropping"] = ratios(rows["dropping"], "dropped / E", limit=None)
    if "scaling" in rows:
        figures["scaling"] = scaling(rows["scaling"], results["settings"])
    if "sizes" in rows:
        figures["sizes"] = sizes(rows["sizes"], results["settings"]["case"])
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


def scaling(rows: dict, settings: dict) -> plt.Figure:
    """A panel per size: the cost in E. The base case is a point in each."""
    base = {
        (size, kind): settings["case"].get(size, settings["sizes"]["prompt" if kind == "decode" else "length"])
        for size in AXES
        for kind in COLOURS
        if kind != "training" or size in ("experts", "stitches")
    }
    figure, grid = plt.subplots(1, len(AXES), figsize=(12, 3), layout="constrained")
    for axes, (size, label) in zip(grid, AXES.items()):
        seen = set()
        for kind, colour in COLOURS.items():
            points = {}
            for name, row in rows.items():
                match = re.fullmatch(rf"(?:{size} = (\d+)|base), {kind}", name)
                if match and (size, kind) in base and "ratios" in row:
                    points[int(match[1] or base[size, kind])] = row["ratios"]["stitched / E"]
            x = sorted(points)
            if x:
                y = [points[value] for value in x]
                errors = [[v["median"] - v["low"] for v in y], [v["high"] - v["median"] for v in y]]
                axes.errorbar(
                    x, [v["median"] for v in y], yerr=errors, label=kind, color=colour, marker="o", capsize=2
                )
            seen |= set(x)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(seen), sorted(seen))
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("stitched / E")
    grid[1].legend(fontsize=8)
    return figure


def sizes(rows: dict, case: dict) -> plt.Figure:
    """Memory and the adapter file by number of experts and by K; the base case is a point in both panels."""
    figure, grid = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for axes, size in zip(grid, ("experts", "stitches")):
        points = {
            int(name.partition(" = ")[2] or case[size]): row
            for name, row in rows.items()
            if name.startswith((size, "base"))
        }
        x = sorted(points)
        for label, what, key in (
            ("training step", "training", "peak_bytes"),
            ("forward", "inference", "peak_bytes"),
            ("adapter file", "load", "file_bytes"),
        ):
            found = [value for value in x if key in points[value][what]]
            axes.plot(found, [points[value][what][key] / 2**20 for value in found], marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, x)
        axes.minorticks_off()
        axes.set_xlabel(AXES[size])
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("MiB")
    grid[1].legend(fontsize=8)
    return figure
