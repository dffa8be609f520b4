"""`peft-bts assess`: does combining these models pay, before any stitch is trained?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import (
    BatchSize,
    Device,
    Dtype,
    Experts,
    Hub,
    MaxTokens,
    Result,
    SequenceLength,
    TextColumn,
    by_name,
    models_by_name,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from peft_bts.planning.assessment import Assessment


def assess(
    hub: Hub,
    expert: Experts,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="A domain and its jsonl file, a document per row. Repeat the option for every domain.",
        ),
    ],
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Draw the losses as bars.")] = None,
    text_column: TextColumn = "text",
    max_tokens: MaxTokens = 32768,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
) -> Result:
    """Measure whether combining models pays: each alone, averaged, as oracles pick them, and mixed by output gates."""
    import torch

    from peft_bts.gates.extras import needs
    from peft_bts.planning.assess import assess as measure
    from peft_bts.reference import as_source

    from .texts import read_texts

    sources, files = models_by_name(expert), by_name(data, "--data", "FILE")
    if plot is not None:  # this, and a folder that is not there, is said before anything is loaded
        needs("matplotlib")
        if not plot.parent.is_dir():
            raise ValueError(f"There is no folder {plot.parent} to write {plot.name} to.")
    documents = {name: read_texts(file, text_column) for name, file in files.items()}
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used: {error}") from error
    found = measure(
        as_source(hub),
        sources,
        documents,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    parts = found.tables()
    if plot is not None:
        draw(found).savefig(plot)
        parts.append(f"Wrote {plot}")
    values = {"hub": hub, "experts": sources, "files": files, **found.to_dict()}
    return Result(parts, {**values, "written": [] if plot is None else [str(plot)]})


def draw(assessment: Assessment) -> Figure:
    """Draw the losses of every domain, and their means, as groups of bars: a colour for each model or combination."""
    from peft_bts.gates.extras import needs

    groups = {name: losses.columns() for name, losses in {**assessment.domains, "mean": assessment.mean}.items()}
    columns = [name for name, loss in groups["mean"].items() if loss is not None]
    width = 0.8 / len(columns)
    figure = needs("matplotlib.figure").Figure(
        figsize=(min(24, max(6, 2 + 0.25 * len(columns) * len(groups))), 4), layout="constrained"
    )
    axes = figure.subplots()
    for number, column in enumerate(columns):
        places = [group + (number - (len(columns) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, [losses[column] for losses in groups.values()], width, label=column, color=f"C{number % 10}")
    axes.set_xticks(range(len(groups)), list(groups), parse_math=False)
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure
