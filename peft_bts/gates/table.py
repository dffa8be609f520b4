"""Gates in numbers: means, entropies and utilisation, over the tokens of a domain, a stitch, a sequence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import HUB_INTO_EXPERTS, OUTPUT_MIXTURE
from ..formatting import TextTable, as_text, table
from ..stitch import HUB
from .sequences import GateSequence, TracedStitch


GROUPS = ("domain", "sequence", "phase", "stitch")


@dataclass
class GateTable:
    """Gates in numbers. Print it, or read `rows`.

    Every row is a dict with the keys in `by` and

    - `layer`, `kind`: of the stitch; `tokens`: how many there are;
    - `gates`: the mean gate of every model;
    - `dominant`: the share of tokens (0 to 1) at which the model's gate is the largest. Hub-into-Experts gates do not
      compete: there it is the share of tokens whose gate is above one half;
    - `entropy`: of a token's gates, in nats, mean over the tokens: 0 if one model has the whole gate, ln(number of
      models) if all have equal shares. Of Hub-into-Experts, the mean of the gates' binary entropies, at most ln 2;
    - `normalised_entropy`: the same divided by its maximum, 0 to 1.

    A gate per channel counts with its mean over the channels.

    Attributes:
        by: The keys by which rows are grouped.
        rows: The rows.
    """

    by: tuple[str, ...]
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """`{"by": [...], "rows": [...]}`, of plain values."""
        return {"by": list(self.by), "rows": self.rows}

    def to_json(self, **kwargs: Any) -> str:
        """`to_dict` as JSON; `kwargs` are those of `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    @property
    def models(self) -> list[str]:
        """Names of the models that have a gate in any row, the hub first."""
        names = {name for row in self.rows for name in row["gates"]}
        return sorted(names, key=lambda name: (name != HUB, name))

    def __rich__(self) -> TextTable:
        keys = [key for key in self.by if key != "stitch"]
        rows = [
            [
                *("-" if row[key] is None else str(row[key]) for key in keys),
                _place(row),
                str(row["tokens"]),
                *(
                    f"{row['gates'][name]:.3f} ({row['dominant'][name]:.0%})" if name in row["gates"] else ""
                    for name in self.models
                ),
                f"{row['entropy']:.3f}",
                f"{row['normalised_entropy']:.3f}",
            ]
            for row in self.rows
        ]
        return table(
            "Mean gates (in brackets: tokens where the model dominates)",
            [*keys, "stitch", "tokens", *self.models, "entropy", "normalised"],
            rows,
            left=1 + len(keys),
            caption="stitch: its hub layer. entropy: of a token's gates, in nats; normalised: divided by its maximum",
        )

    def __str__(self) -> str:
        return as_text(self)


def make_table(
    stitches: list[TracedStitch], sequences: list[GateSequence], by: tuple[str, ...], stitch: int
) -> GateTable:
    """See `GateTrace.table`."""
    unknown = [name for name in by if name not in GROUPS]
    if unknown or not by:
        raise ValueError(f"Rows can be by {', '.join(GROUPS)}, or several of these; got {by}.")
    chosen = range(len(stitches)) if "stitch" in by else [range(len(stitches))[stitch]]
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for i, sequence in enumerate(sequences):
        generated = torch.tensor(sequence.generated)
        phases = {"prompt": ~generated, "generated": generated} if "phase" in by else {None: slice(None)}
        for s in chosen:
            for phase, tokens in phases.items():
                gates = sequence.gates[s][tokens]
                gates = gates[~gates.isnan().all(1)]  # the stitch may belong to another adapter
                if len(gates):
                    key = {"domain": sequence.domain, "sequence": i, "phase": phase, "stitch": s}
                    groups.setdefault((s, *(key[name] for name in by)), []).append(gates)
    rows = [{**dict(zip(by, key)), **summary(stitches[s], torch.cat(gates))} for (s, *key), gates in groups.items()]
    return GateTable(by, rows)


def _place(row: dict[str, Any]) -> str:
    if row["kind"] == OUTPUT_MIXTURE:
        return "output"
    return f"{row['layer']}, {row['kind'].partition('_')[2].replace('_', ' ')}"


def summary(stitch: TracedStitch, gates: Tensor) -> dict[str, Any]:
    """One row of a table, without its keys, from a stitch's gates (tokens, models); NaN: the model took no part."""
    active = ~gates.isnan()
    filled = gates.nan_to_num(0.0).double()
    if stitch.kind != HUB_INTO_EXPERTS:  # one softmax over all models
        dominant = torch.nn.functional.one_hot(filled.argmax(1), len(stitch.models)).double()
        entropy = torch.special.entr(filled).sum(1)
        largest = active.sum(1).double().log()
    else:
        dominant = (filled > 0.5).double()
        entropy = ((torch.special.entr(filled) + torch.special.entr(1 - filled)) * active).sum(1) / active.sum(1)
        largest = torch.full_like(entropy, math.log(2))
    counts = active.sum(0)
    seen = [m for m in range(len(stitch.models)) if counts[m]]
    return {
        "layer": stitch.layer,
        "kind": stitch.kind,
        "tokens": len(gates),
        "gates": {stitch.models[m]: (filled[:, m].sum() / counts[m]).item() for m in seen},
        "dominant": {stitch.models[m]: (dominant[:, m].sum() / counts[m]).item() for m in seen},
        "entropy": entropy.mean().item(),
        "normalised_entropy": (entropy / largest).mean().item(),
    }
