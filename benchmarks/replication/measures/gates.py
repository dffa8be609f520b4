"""Whom a stitched model listens to: mean gates by domain, and how fast they turn where the domain changes."""

from typing import Any

import numpy as np
import torch
from torch import nn

from peft_bts import trace_gates

from ..tokens.sequences import Sequences


BEFORE, AFTER = 16, 48  # tokens that are shown of a change


def gates_of(model: nn.Module, sequences: Sequences, batch: int = 16) -> tuple[list[str], list[np.ndarray]]:
    """The models with a gate in the last stitch, or in the output mixture, where there is one; and these gates.

    Returns:
        Names, and for every sequence an array (T, models).
    """
    lengths = np.diff(sequences.starts)
    found: dict[int, np.ndarray] = {}
    models: list[str] = []
    for rows, tokens in sequences.batches(batch):
        mask = (torch.arange(tokens.shape[1]) < torch.from_numpy(lengths[rows])[:, None]).long()
        device = next(model.parameters()).device
        with torch.no_grad(), trace_gates(model) as trace:
            model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
        models = list(trace.stitches[-1].models)
        found |= {int(row): one.gates[-1].numpy() for row, one in zip(rows, trace.sequences)}
    return models, [found[row] for row in range(len(lengths))]


def changes(sequences: Sequences, owners: dict[str, str]) -> list[tuple[int, int, str, str]]:
    """Where one domain ends and another begins: (sequence, first token of the new domain, old owner, new owner)."""
    found = []
    for row, kinds in enumerate(sequences.of(sequences.kinds)):
        owner = [owners.get(sequences.names[kind]) if kind >= 0 else None for kind in kinds]
        for place in range(1, len(owner)):
            old, new = owner[place - 1], owner[place]
            if old and new and old != new:
                found.append((row, place, old, new))
    return found


def measure_gates(
    model: nn.Module, text: dict[str, Sequences], switches: Sequences, owners: dict[str, str]
) -> dict[str, Any]:
    """Mean gates on `text`, by domain, and around the changes of domain in `switches`.

    Args:
        owners: Which model knows a kind of text best; kinds that are not in it have no owner.

    Returns:
        `models`: their names; `mean`: domain -> model -> mean gate over all tokens; `turn`: `tokens`, counted from the
        new domain's first token, and the mean gates of the `old` and the `new` domain's models when that token is
        predicted; `changes`: of how many.
    """
    mean = {}
    for domain, sequences in text.items():
        models, gates = gates_of(model, sequences)
        mean[domain] = dict(zip(models, map(float, np.concatenate(gates).mean(0))))
    models, gates = gates_of(model, switches)
    found = changes(switches, owners)
    sums, counts = np.zeros((2, BEFORE + AFTER)), np.zeros(BEFORE + AFTER)
    for row, place, *both in found:
        for offset in range(-BEFORE, AFTER):
            predicted_at = place + offset - 1  # the gates behind a token decide about the next one
            if 0 <= predicted_at < len(gates[row]):
                sums[:, offset + BEFORE] += [gates[row][predicted_at, models.index(owner)] for owner in both]
                counts[offset + BEFORE] += 1
    seen = counts > 0  # short documents have no token so far away
    old, new = (sums[:, seen] / counts[seen]).tolist()
    tokens = np.arange(-BEFORE, AFTER)[seen].tolist()
    return {"models": models, "mean": mean, "turn": {"tokens": tokens, "old": old, "new": new}, "changes": len(found)}
