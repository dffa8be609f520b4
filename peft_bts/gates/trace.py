"""`trace_gates`: the gates of every token and model, recorded while a model runs.

    with trace_gates(model) as trace:
        with trace.domain("math"):
            model.generate(**inputs)
    print(trace.table())

When its last stitch is done, a forward tells the traces of its model the gates of its tokens (`Observation.gates`).
A trace joins the forwards that continue one cache into sequences: the prompt and every generated token of a
`generate()`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache

from ..config import OUTPUT_MIXTURE
from ..export.model import StitchExportForCausalLM, StitchExportModel
from ..forward.hooks import ForwardSettings
from ..forward.masks import is_text
from ..forward.observers import Observation, Observer
from ..model import StitchModel, stitch_tuner
from ..stitch import HUB
from .page import to_html
from .plots import plot_domains, plot_tokens
from .sequences import Batch, Chunk, GateSequence, Generation, TracedStitch
from .table import GateTable, make_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHANGE_OBSERVERS = threading.Lock()


@contextmanager
def trace_gates(model: nn.Module) -> Iterator[GateTrace]:
    """Record the gates of `model` in every forward and `generate()` inside the `with`, in this thread.

    Recording changes no output. Of a gate per channel, the mean over the channels is recorded. Calls of the same model
    in other threads are not recorded. Traces may be nested, and each records everything. Compiled code breaks its
    graph to record, so `torch.compile(fullgraph=True)` fails inside of a trace; outside, nothing changes for it.

    Args:
        model: A `PeftModel` with a stitch adapter, its tuner (`StitchModel`), or an exported composition
            (`StitchExportForCausalLM`), also wrapped for distributed training or compiled.

    Raises:
        TypeError: If there are no stitches in `model`.
    """
    trace = GateTrace()
    with observed_by(trace, model):
        yield trace


@contextmanager
def observed_by(observer: Observer, model: nn.Module) -> Iterator[None]:
    """Tell an observer of the forwards of `model` inside of the `with`, those of other threads too.

    Raises:
        TypeError: If there are no stitches in `model`.
    """
    settings = _settings(model)
    with _CHANGE_OBSERVERS:
        settings.observers = (*settings.observers, observer)
    try:
        yield
    finally:
        with _CHANGE_OBSERVERS:
            settings.observers = tuple(other for other in settings.observers if other is not observer)


def _settings(model: nn.Module) -> ForwardSettings:
    """Return what holds the observers of a model."""
    inner = model
    while not isinstance(inner, (PeftModel, StitchModel, StitchExportForCausalLM, StitchExportModel)):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)  # compiled; DDP and the like
        if not isinstance(wrapped, nn.Module):
            raise TypeError(
                "Gates can be traced in a PeftModel with a stitch adapter, its StitchModel, or a "
                f"StitchExportForCausalLM; got a {type(model).__name__}."
            )
        inner = wrapped
    if isinstance(inner, PeftModel):
        inner = stitch_tuner(inner)
    if isinstance(inner, StitchModel):
        return inner._forward.settings
    return (inner.model if isinstance(inner, StitchExportForCausalLM) else inner)._runner.settings


class GateTrace:
    """The record of `trace_gates`; it can be read during the `with` and after it.

    Stitches are counted from the first layer to the last, as in `stitches`: `stitch=-1` is the last stitch,
    or the output gates where outputs are mixed.
    Beam search is recorded as it was computed: a sequence is a place in the batch of beams with the tokens that were
    given to the beams in this place, not one of the returned texts. Drafted tokens that were rejected are left out.

    Attributes:
        label: The domain of the sequences that begin from now on.
    """

    def __init__(self) -> None:
        self.label: Optional[str] = None
        self._thread = threading.get_ident()
        self._batches: list[Batch] = []
        self._of_cache: weakref.WeakKeyDictionary[Cache, Batch] = weakref.WeakKeyDictionary()
        self._generation: Optional[Generation] = None

    @contextmanager
    def domain(self, label: str) -> Iterator[None]:
        """Label the sequences that begin inside of the `with`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    # ---------------------------------------------------------------- recording

    def record(self, forward: Observation) -> None:
        """Take in a forward (called by the model)."""
        if not self._is_ours():
            return
        tokens = forward.call.get("input_ids")
        kinds = {forward.composition.hub_layers: OUTPUT_MIXTURE, **forward.composition.schedule}
        gates = {
            (layer, kinds[layer]): (tuple(by_model), torch.stack(tuple(by_model.values())))
            for layer, by_model in forward.gates.items()
        }
        *_, rows, columns = next(iter(gates.values()))[1].shape
        generation = self._generation
        if forward.cache is not None:
            batch = self._of_cache.get(forward.cache)
            start = forward.past
            if start is None:  # recurrent layers do not count their tokens, nor do compiled steps
                start = 0 if batch is None else batch.end
            continues = batch is not None and 0 < start <= batch.end
        else:
            batch, start = None if generation is None else generation.uncached, 0
            continues = batch is not None and batch.end <= columns
        if batch is None or not continues or rows != batch.rows:
            batch = Batch(self.label, rows)
            self._batches.append(batch)
            if forward.cache is not None:
                self._of_cache[forward.cache] = batch
        batch.cut(start)
        batch.chunks.append(
            Chunk(
                start,
                columns,
                None if tokens is None else tokens.detach().clone(),
                is_text(forward.call.get("attention_mask"), forward.composition.hub_config, start, columns),
                gates,
                generation,
                None if generation is None else generation.prompt_of(batch, forward.cache, start + columns),
            )
        )

    def _is_ours(self) -> bool:
        """Return whether this is the thread that the trace was opened in."""
        return threading.get_ident() == self._thread

    @contextmanager
    def generating(self, prompt: int, ends: list[int]) -> Iterator[None]:
        """Inside of the `with`, the tokens behind the first `prompt` are generated, up to one of `ends`."""
        if not self._is_ours():
            yield
            return
        outer, self._generation = self._generation, Generation(prompt, ends)
        try:
            yield
        finally:
            self._generation.drop_rejected()
            self._generation = outer

    # ---------------------------------------------------------------- reading

    @property
    def stitches(self) -> list[TracedStitch]:
        """The stitches that were passed, in their order."""
        models: dict[tuple[int, str], set[str]] = {}
        for batch in self._batches:
            for chunk in batch.chunks:
                for key, (names, _) in chunk.gates.items():
                    models.setdefault(key, set()).update(names)
        return [
            TracedStitch(*key, tuple(sorted(names, key=lambda name: (name != HUB, name))))
            for key, names in sorted(models.items())
        ]

    @property
    def sequences(self) -> list[GateSequence]:
        """All sequences, those of a batch one after another. Sequences of padding only are left out."""
        stitches = self.stitches
        return [sequence for batch in self._batches for sequence in batch.sequences(stitches) if len(sequence)]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All gates as flat dicts, one for each token and stitch: a `pandas.DataFrame` takes them as they are.

        Keys: `sequence`, `position` (in its text, from 0), `token_id`, `domain`, `generated`, `stitch`, `layer`,
        `kind`, and `gate.<model>` for each model.
        """
        return [
            {
                "sequence": i,
                "position": position,
                "token_id": sequence.token_ids[position],
                "domain": sequence.domain,
                "generated": sequence.generated[position],
                "stitch": s,
                "layer": stitch.layer,
                "kind": stitch.kind,
                **{f"gate.{name}": gate for name, gate in zip(stitch.models, gates) if gate == gate},
            }
            for i, sequence in enumerate(self.sequences)
            for s, stitch in enumerate(self.stitches)
            for position, gates in enumerate(sequence.gates[s].tolist())
        ]

    def table(self, by: Union[str, tuple[str, ...]] = "domain", stitch: int = -1) -> GateTable:
        """Mean gates, their entropy, and how often each model dominates; see `GateTable`.

        Args:
            by: What the rows are: `"domain"`, `"sequence"`, `"phase"` (prompt or generated), `"stitch"`, or several.
            stitch: Which stitch, unless the rows are the stitches.

        Raises:
            ValueError: If `by` is unknown, or nothing was recorded.
            IndexError: If there is no such stitch.
        """
        self._check_not_empty()
        return make_table(self.stitches, self.sequences, (by,) if isinstance(by, str) else tuple(by), stitch)

    def plot(
        self,
        by: str = "token",
        *,
        stitch: int = -1,
        tokenizer: Any = None,
        sequences: Optional[Iterable[int]] = None,
    ) -> Figure:
        """Draw the gates of one stitch (needs `peft_bts[viz]`).

        Args:
            by: `"token"`: over each sequence, as in the paper's figures 2 and 3; `"domain"`: means, domains x models.
            stitch: Which stitch; the paper's figures show the last.
            tokenizer: To write the tokens' texts below; else their ids.
            sequences: Which, by their place in `sequences`; by default the first of every domain.

        Returns:
            A matplotlib `Figure`; `figure.savefig("gates.png")` saves it.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If `by` is unknown, or nothing was recorded.
        """
        self._check_not_empty()
        if by == "token":
            return plot_tokens(self.stitches, self.sequences, stitch, tokenizer, sequences)
        if by == "domain":
            return plot_domains(self.stitches[stitch], self.table(by="domain", stitch=stitch))
        raise ValueError(f"Gates can be drawn by 'token' or 'domain', got {by!r}.")

    def to_html(self, path: Union[str, os.PathLike[str], None] = None, *, tokenizer: Any = None) -> str:
        """Make a page of all sequences, every token in the colour of its dominant model; the stitch can be chosen.

        Pointing at a token shows all its gates. The page is one file and loads nothing. Colours are told apart with
        every kind of colour blindness for up to seven experts; the eighth has the first one's colour.

        Args:
            path: A file to write, or `None`.
            tokenizer: To show the tokens' texts; else their ids.

        Returns:
            The page.

        Raises:
            ValueError: If nothing was recorded.
        """
        self._check_not_empty()
        page = to_html(self.stitches, self.sequences, tokenizer)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _check_not_empty(self) -> None:
        if not self._batches:
            raise ValueError("Nothing was recorded: run the model inside of `with trace_gates(model) as trace:`.")
