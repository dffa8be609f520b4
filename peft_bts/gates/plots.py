"""Gates in figures, drawn by matplotlib: token by token as in the paper's figures 2 and 3, and means by domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional

from .extras import needs
from .labels import colours, stitch_name, token_texts
from .sequences import GateSequence, TracedStitch
from .table import GateTable


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 150  # tokens beyond which their texts would not be readable in a figure
_LONGEST_LABEL = 16  # characters of a token's text below a figure


def plot_tokens(
    stitches: list[TracedStitch],
    sequences: list[GateSequence],
    stitch: int,
    tokenizer: Any,
    chosen: Optional[Iterable[int]],
) -> Figure:
    """Draw a line per model over the tokens of each sequence, see `GateTrace.plot`.

    Args:
        stitches, sequences: What was traced.
        stitch: Whose gates are drawn, by its place in `stitches`.
        tokenizer: To write the tokens' texts below; `None` for their ids.
        chosen: Which sequences are drawn; `None` for the first of every domain.

    Raises:
        IndexError: If there is no such stitch or sequence.
    """
    one, palette = stitches[stitch], colours(stitches)
    if chosen is None:
        first = {sequence.domain: i for i, sequence in reversed(list(enumerate(sequences)))}
        chosen = sorted(first.values())
    drawn = [sequences[i] for i in chosen]
    longest = max(len(sequence) for sequence in drawn)
    figure = needs("matplotlib.figure").Figure(
        figsize=(min(24, max(6, 1.5 + 0.16 * longest)), 0.6 + 2.4 * len(drawn)), layout="constrained"
    )
    for axes, sequence in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn):
        _plot_sequence(axes, sequence, one, sequence.gates[stitch], palette, tokenizer)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _plot_sequence(
    axes: Any, sequence: GateSequence, stitch: TracedStitch, gates: Any, palette: dict[str, str], tokenizer: Any
) -> None:
    for name, values in zip(stitch.models, gates.T.tolist()):
        axes.plot(values, label=name, color=palette[name], linewidth=1.8, marker=".", markersize=4)
    for i, generated in enumerate(sequence.generated):
        if generated:
            axes.axvspan(i - 0.5, i + 0.5, color="0.5", alpha=0.15, linewidth=0)
    axes.set(xlim=(-0.5, len(sequence) - 0.5), ylim=(0, 1), ylabel="gate")
    title = f"{sequence.domain or 'gates'}: {stitch_name(stitch)}"
    title += "; generated tokens on grey" if any(sequence.generated) else ""
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)  # a `$` in a text starts no formula
    if len(sequence) <= _MOST_TICKS:
        texts = [_label(text) for text in token_texts(sequence.token_ids, tokenizer)]
        axes.set_xticks(range(len(sequence)), texts, rotation=90, fontsize=7, family="monospace", parse_math=False)
    else:
        axes.set_xlabel("token")


def _label(text: str) -> str:
    """A token's text as it can stand below an axis."""
    if not text:
        return ""  # a part of the next token's character
    text = text.replace("\n", "↵").replace("\t", "⇥").strip() or "␣"
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def plot_domains(stitch: TracedStitch, table: GateTable) -> Figure:
    """Draw the mean gates of one stitch as a heatmap, domains x models, from its table by domain."""
    rows, models = table.rows, stitch.models
    means = [[row["gates"].get(name, float("nan")) for name in models] for row in rows]
    figure = needs("matplotlib.figure").Figure(
        figsize=(2.2 + 0.9 * len(models), 1.4 + 0.5 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(means, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(models)), models)
    axes.set_yticks(range(len(rows)), [str(row["domain"] or "-") for row in rows], parse_math=False)
    axes.set_title(f"Mean gates, {stitch_name(stitch)}", fontsize=10)
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            axes.text(x, y, f"{mean:.2f}", ha="center", va="center", color="black" if mean > 0.5 else "white")
    figure.colorbar(image, ax=axes, label="gate")
    return figure
