"""The report's plots: bits per byte of all methods, and learning curves."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...reporting import save_figures
from ..methods.registry import TITLES, is_ours


def draw_all(results: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every figure into `folder`; their file names by title."""
    return save_figures({"bits": bits(results), "curves": curves(results)}, folder)


def bits(results: dict[str, Any]) -> Figure:
    """Bits per byte of all methods, best on top, on the domains and on mixed text; bars are standard deviations."""
    figure = Figure(figsize=(10, 0.25 * len(results["methods"]) + 1), layout="constrained")
    for axes, on in zip(figure.subplots(1, 2), ("average", "mixed")):
        rows = [(name, row["bits_per_byte"][on]) for name, row in results["methods"].items()]
        rows.sort(key=lambda row: -row[1]["mean"])
        colours = ["#d62728" if is_ours(name) else "#bbbbbb" if "oracle" in name else "#9db8d2" for name, _ in rows]
        means = [spread["mean"] for _, spread in rows]
        axes.barh([TITLES[name] for name, _ in rows], means, xerr=[spread["sd"] or 0 for _, spread in rows],
                  color=colours, error_kw={"lw": 1})  # fmt: skip
        axes.set_xlim(left=0.9 * min(means))
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("bits per byte, " + {"average": "average of the domains", "mixed": "mixed text"}[on])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(results: dict[str, Any]) -> Figure:
    """Bits per byte on validation text by share of the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in results["methods"].items():
        curve = row.get("curve", {})
        if len(curve) > 1:
            steps = [100 * float(share) for share in curve]
            style = "-" if is_ours(name) else "--"
            axes.plot(
                steps, [spread["mean"] for spread in curve.values()], style, marker="o", ms=3, label=TITLES[name]
            )
    axes.set_xlabel("% of the steps")
    axes.set_ylabel("bits per byte on validation text")
    if axes.lines:
        axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
