"""The report's plots: averages, and the gates of the last stitch (the paper's figures 2 and 3)."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporting import save_figures
from .data import DOMAINS


COLOURS = {"hub": "#888888", "code": "#1f77b4", "lang": "#2ca02c", "math": "#d62728"}


def draw_all(results: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every figure into `folder`; their file names by title."""
    figures = {"averages": averages(results)}
    if results["gates"]:
        figures |= {"prompts": gate_prompts(results["gates"]), "switching": gate_switching(results["gates"])}
    return save_figures(figures, folder)


def averages(results: dict[str, Any]) -> Figure:
    """All methods' averages, best on top; bars are two standard errors, or the standard deviation over sets."""
    methods = sorted(results["methods"].items(), key=lambda item: item[1]["average"]["mean"])
    figure = Figure(figsize=(7, 0.27 * len(methods) + 0.8))
    axes = figure.subplots()
    means = [result["average"]["mean"] for _, result in methods]
    errors = [result["average"]["sd"] or 2 * result["se"] for _, result in methods]
    colours = [
        "#d62728" if name == "bts" else "#f2a3a3" if name.startswith("bts") else "#9db8d2" for name, _ in methods
    ]
    axes.barh([name for name, _ in methods], means, xerr=errors, color=colours, error_kw={"lw": 1})
    axes.set_xlabel("average of four domains, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_gates(axes: Axes, shown: dict[str, Any], models: list[str]) -> None:
    gates = list(zip(*shown["gates"]))
    for model, values in zip(models, gates):
        axes.plot(values, label=model, color=COLOURS.get(model), lw=1.3)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, len(shown["tokens"]) - 1)
    labels = [token.replace("\n", "\\n").replace("$", r"\$").strip() or "_" for token in shown["tokens"]]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)


def gate_prompts(gates: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 9), layout="constrained")
    grid = figure.subplots(len(DOMAINS), 1)
    for axes, (domain, title) in zip(grid, DOMAINS.items()):
        draw_gates(axes, gates["prompts"][domain], gates["models"])
        axes.set_title(title, fontsize=9, loc="left")
    grid[0].legend(ncol=4, fontsize=8, loc="upper right")
    return figure


def gate_switching(gates: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 2.8))
    axes = figure.subplots()
    draw_gates(axes, gates["switching"], gates["models"])
    for i, domain in enumerate(gates["switching"]["order"]):
        axes.axvline(i * gates["switching"]["every"], color="black", lw=0.7, ls=":")
        axes.text(i * gates["switching"]["every"] + 0.3, 0.93, DOMAINS[domain], fontsize=8)
    axes.legend(ncol=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    return figure
