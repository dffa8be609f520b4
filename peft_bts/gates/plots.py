"""Gates in pictures: the paper's figures 2 and 3 with matplotlib, and a page of coloured tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING, Any, Optional, Union

from ..stitch import HUB
from .extras import needs


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .sequences import GateSequence, TracedStitch
    from .trace import GateTrace

HUB_COLOUR = "#999999"
# Okabe and Ito: told apart with every kind of colour blindness. More experts than that share colours.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")
_MOST_TICKS = 150  # tokens beyond which their texts would not be readable in a figure
_LONGEST_LABEL = 16  # characters of a token's text below a figure


def colours(stitches: list[TracedStitch]) -> dict[str, str]:
    """A colour for each model, the same in all views; the hub is grey."""
    experts = sorted({name for stitch in stitches for name in stitch.models} - {HUB})
    return {HUB: HUB_COLOUR, **dict(zip(experts, cycle(COLOURS)))}


def token_texts(token_ids: list[Optional[int]], tokenizer: Any) -> list[str]:
    """What each token adds to the text; without a tokenizer, the ids.

    Decoding tokens one by one would lose spaces, and characters that several tokens share: those come with their last
    token, and the others are `�`.
    """
    if tokenizer is None:
        return ["?" if token is None else str(token) for token in token_ids]
    texts, before, shown = [], 0, 0  # tokens [before:shown] are the context that the next token is decoded in
    for end in range(1, len(token_ids) + 1):
        if token_ids[end - 1] is None:
            texts.append("?")
            before = shown = end
            continue
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        context = tokenizer.decode(token_ids[before:shown], **options)
        text = tokenizer.decode(token_ids[before:end], **options)
        if text.endswith("\ufffd") and end - shown < 4:  # UTF-8 has at most 4 bytes
            texts.append("\ufffd")
            continue
        texts.append(text[len(context) :])
        before, shown = shown, end
    return texts


def _label(text: str) -> str:
    """A token's text as it can stand below an axis."""
    text = text.replace("\n", "↵").replace("\t", "⇥").strip() or "␣"
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def plot_tokens(trace: GateTrace, stitch: int, tokenizer: Any, sequences: Optional[Iterable[int]]) -> Figure:
    """A line per model over the tokens of each sequence."""
    everything, one = trace.sequences, trace.stitches[stitch]
    if sequences is None:  # the first of every domain
        first = {sequence.domain: i for i, sequence in reversed(list(enumerate(everything)))}
        sequences = sorted(first.values())
    chosen = [everything[i] for i in sequences]
    longest = max(len(sequence) for sequence in chosen)
    figure = needs("matplotlib.figure").Figure(
        figsize=(min(24, max(6, 1.5 + 0.16 * longest)), 0.6 + 2.4 * len(chosen)), layout="constrained"
    )
    palette = colours(trace.stitches)
    for axes, sequence in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen):
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
    title = f"{sequence.domain or 'gates'}: {_place(stitch)}"
    title += "; generated tokens on grey" if any(sequence.generated) else ""
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)  # a `$` in a text starts no formula
    if len(sequence) <= _MOST_TICKS:
        texts = [_label(text) for text in token_texts(sequence.token_ids, tokenizer)]
        axes.set_xticks(range(len(sequence)), texts, rotation=90, fontsize=7, family="monospace", parse_math=False)
    else:
        axes.set_xlabel("token")


def plot_domains(trace: GateTrace, stitch: int) -> Figure:
    """A heatmap of mean gates, domains x models."""
    rows = trace.table(by="domain", stitch=stitch).rows
    models = trace.stitches[stitch].models
    means = [[row["gates"].get(name, float("nan")) for name in models] for row in rows]
    figure = needs("matplotlib.figure").Figure(
        figsize=(2.2 + 0.9 * len(models), 1.4 + 0.5 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(means, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(models)), models)
    axes.set_yticks(range(len(rows)), [str(row["domain"] or "-") for row in rows], parse_math=False)
    axes.set_title(f"Mean gates, {_place(trace.stitches[stitch])}", fontsize=10)
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            axes.text(x, y, f"{mean:.2f}", ha="center", va="center", color="black" if mean > 0.5 else "white")
    figure.colorbar(image, ax=axes, label="gate")
    return figure


def _place(stitch: TracedStitch) -> str:
    return f"{stitch.kind.replace('_', ' ')} behind layer {stitch.layer}"


def to_html(trace: GateTrace, path: Union[str, os.PathLike, None], tokenizer: Any) -> str:
    """See `GateTrace.to_html`. All texts are data of the page (JSON), never its markup."""
    stitches, sequences = trace.stitches, trace.sequences
    data = {
        "colours": colours(stitches),
        "stitches": [{"name": _place(stitch), "kind": stitch.kind, "models": stitch.models} for stitch in stitches],
        "sequences": [
            {
                "domain": sequence.domain,
                "ids": sequence.token_ids,
                "texts": token_texts(sequence.token_ids, tokenizer),
                "generated": sequence.generated,
                "gates": [
                    [[None if gate != gate else round(gate, 3) for gate in token] for token in gates.tolist()]
                    for gates in sequence.gates
                ],
            }
            for sequence in sequences
        ],
    }
    # In a script element, only `<` could end the data.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("peft_bts.gates").joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("__DATA__", text).replace("__SPACED__", "ids" if tokenizer is None else "text")
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)
    return page
