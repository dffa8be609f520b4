"""The page's plots: cost and memory as curves over one size. What a table shows as well has no picture."""

import re
from collections.abc import Collection
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporting import save_figures


COLOURS = {"prefill": "#1f77b4", "decode": "#d62728", "training": "#2ca02c"}
AXES = {"experts": "experts", "stitches": "stitches, K", "width": "width", "length": "tokens"}


@rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8})
def draw_all(results: dict, folder: Path) -> dict[str, str]:
    """Write a figure for every section that has one, and return their paths from the page, by section."""
    drawings = {
        "scaling": lambda rows: scaling(rows, results["settings"]),
        "sizes": lambda rows: sizes(rows, results["settings"]["case"]),
    }
    return save_figures(
        {name: draw(results["rows"][name]) for name, draw in drawings.items() if results["rows"].get(name)}, folder
    )


def with_errors(spreads: Collection[dict]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles are below and above them."""
    medians = [s["median"] for s in spreads]
    return medians, [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]


def by_size(rows: dict, size: str, base: int, kind: str = "") -> dict[int, dict]:
    """Rows by the value of one size, in order: those called "<size> = <value><kind>", and "base<kind>"."""
    matches = ((re.fullmatch(rf"(?:{size} = (\d+)|base){kind}", name), row) for name, row in rows.items())
    return dict(sorted({int(match[1] or base): row for match, row in matches if match}.items()))


def label_sizes(axes: Axes, size: str, values: Collection[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), sorted(values))
    axes.minorticks_off()
    axes.set_xlabel(AXES[size])


def scaling(rows: dict, settings: dict) -> Figure:
    """A panel per size: the cost in E. The base case is a point in each."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    panels = figure.subplots(1, len(AXES))
    for axes, size in zip(panels, AXES):
        kinds = [kind for kind in COLOURS if any(re.fullmatch(rf"{size} = \d+, {kind}", name) for name in rows)]
        seen = set()
        for kind in kinds:
            base = settings["case"].get(size, settings["sizes"]["prompt" if kind == "decode" else "length"])
            points = by_size(rows, size, base, f", {kind}")
            points = {value: row["ratios"]["stitched / E"] for value, row in points.items() if "ratios" in row}
            medians, errors = with_errors(points.values())
            axes.errorbar([*points], medians, yerr=errors, label=kind, color=COLOURS[kind], marker="o", capsize=2)
            seen |= points.keys()
        label_sizes(axes, size, seen)
    panels[0].set_ylabel("stitched / E")
    panels[1].legend()
    return figure


def sizes(rows: dict, case: dict) -> Figure:
    """Memory and the adapter file by number of experts and by K; the base case is a point in both panels."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, size in zip(panels, ("experts", "stitches")):
        points = by_size(rows, size, case[size])
        for label, what, key in (
            ("training step", "training", "peak_bytes"),
            ("forward", "inference", "peak_bytes"),
            ("adapter file", "load", "file_bytes"),
        ):
            found = {value: row[what][key] / 2**20 for value, row in points.items() if key in row[what]}
            axes.plot([*found], [*found.values()], marker="o", label=label)
        axes.set_yscale("log")
        label_sizes(axes, size, points)
    panels[0].set_ylabel("MiB")
    panels[1].legend()
    return figure
