"""The report's plots: bits per byte of all methods, learning curves, and gates."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...reporting import save_figures
from ..methods.registry import TITLES, is_ours
from .cells import everywhere


def draw_all(results: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every figure into `folder`; their file names by title."""
    figures = {"bits": bits(results), "curves": curves(results)}
    if results["forgetting"]:
        figures["forgetting"] = forgetting(results)
    if results["gates"]:
        figures |= {"gates": gates(results["gates"]), "turn": turn(results["gates"])}
    return save_figures(figures, folder)


def bits(results: dict[str, Any]) -> Figure:
    """Bits per byte of all methods that ran on all sets, best on top; lines are standard deviations over sets."""
    methods = everywhere(results)
    figure = Figure(figsize=(10, 0.25 * len(methods) + 1), layout="constrained")
    for axes, on in zip(figure.subplots(1, 2), ("average", "mixed")):
        rows = [(name, row["bits_per_byte"][on]) for name, row in methods.items()]
        rows.sort(key=lambda row: -row[1]["mean"])
        colours = ["#d62728" if is_ours(name) else "#bbbbbb" if "oracle" in name else "#9db8d2" for name, _ in rows]
        means = [spread["mean"] for _, spread in rows]
        titles = [TITLES[name] for name, _ in rows]
        spreads = [spread["sd"] or 0 for _, spread in rows]
        axes.hlines(titles, np.subtract(means, spreads), np.add(means, spreads), colors=colours)
        axes.scatter(means, titles, c=colours, s=24, zorder=3)
        axes.grid(axis="x", lw=0.4)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("bits per byte, " + {"average": "average of the domains", "mixed": "mixed text"}[on])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(results: dict[str, Any]) -> Figure:
    """Bits per byte on validation text by share of the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in everywhere(results).items():
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


def forgetting(results: dict[str, Any]) -> Figure:
    """BTM by its factor of forgetting, a line, and methods that were trained, points: both goals at once."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    line = {factor: [row[on]["mean"] for on in ("average", "mixed")] for factor, row in results["forgetting"].items()}
    axes.plot(*zip(*line.values()), color="#7f7f7f", marker="o", ms=4, label="BTM, by its factor of forgetting")
    for factor, place in line.items():
        axes.annotate(factor, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color="#7f7f7f")
    methods = everywhere(results)
    for name in ("outputs_evidence", "bts_outputs", "bts_token_r8_outputs", "outputs", "token_router"):
        if name in methods:
            bits = methods[name]["bits_per_byte"]
            axes.scatter(bits["average"]["mean"], bits["mixed"]["mean"], label=TITLES[name], zorder=3)
    axes.set_xlabel("bits per byte, average of the domains")
    axes.set_ylabel("bits per byte, mixed text")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def gates(found: dict[str, Any]) -> Figure:
    """Mean gates of each form, three beside each other: a row for each domain, a column for each model."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.4 * columns + 1, 3.6 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in places[len(found) :]:
        axes.set_visible(False)
    for axes, (name, row) in zip(places, found.items()):
        table = [[row["mean"][domain][model] for model in row["models"]] for domain in row["mean"]]
        axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(row["models"])), row["models"], rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(row["mean"])), [*row["mean"]], fontsize=8)
        axes.set_title(TITLES[name], fontsize=8)
        for y, values in enumerate(table):
            for x, value in enumerate(values):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 0.6 else "black")  # fmt: skip
    return figure


def turn(found: dict[str, Any]) -> Figure:
    """Gates of the old domain's model (dashed) and of the new one's (solid) around a change of domain."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(found.items()):
        tokens, colour = row["turn"]["tokens"], f"C{number}"
        axes.plot(tokens, row["turn"]["new"], color=colour, label=TITLES[name])
        axes.plot(tokens, row["turn"]["old"], color=colour, ls="--", lw=1)
    axes.axvline(0, color="black", lw=0.7, ls=":")
    axes.set_xlabel("token, from the first one of the new domain (solid: its model's gate; dashed: the old domain's)")
    axes.set_ylabel("mean gate")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
