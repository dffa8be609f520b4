"""The gates of the last stitch, token by token: one prompt of each domain, and sequences that switch domain."""

from typing import Any

import torch
from torch import nn

from peft_bts import trace_gates as traced

from .data import DOMAINS, TASKS, Data
from .training import device_of


SHOWN = 64  # tokens of a figure


def trace_gates(model: nn.Module, data: Data) -> dict[str, Any]:
    """Gates of the last stitch on test data, the mean over channels.

    Returns:
        `models`; `mean`: domain -> model -> mean gate over all tokens of the domain's test rows; `prompts`: domain ->
        tokens and gates (T, models) of one sequence; `switching`: the same of one sequence that passes through all.
    """
    rows = data.rows["test"]
    means, prompts, device = {}, {}, device_of(model)
    for domain in DOMAINS:
        blocks = rows[f"{domain}_blocks"].tokens
        gates = [gate for part in blocks.split(32) for _, gate in gates_of(model, part.to(device))]
        means[domain] = torch.cat(gates).mean(0).tolist()
        first = rows[domain] if domain in TASKS else rows[f"{domain}_blocks"]
        scored = int((first.labels[0] != -100).nonzero().max()) + 1
        prompts[domain] = shown(model, data, first.tokens[:1, : min(scored, SHOWN)])
    quarter = SHOWN // 4
    pieces = [rows[f"{domain}_blocks"].tokens[1:2, :quarter] for domain in ("text", "math", "lang", "code")]
    with torch.no_grad(), traced(model) as trace:
        model(input_ids=prompt_of(rows["math"]).to(device), use_cache=False)
    models = list(trace.stitches[-1].models)
    return {
        "models": models,
        "mean": {domain: dict(zip(models, mean)) for domain, mean in means.items()},
        "prompts": prompts,
        "switching": {**shown(model, data, torch.cat(pieces, dim=1)), "every": quarter},
    }


def prompt_of(rows) -> torch.Tensor:
    return rows.tokens[:1, : int(rows.prompt[0])]


def gates_of(model: nn.Module, tokens: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
    """For every sequence of a batch (B, T): its tokens, and the last stitch's gates (T, models)."""
    with torch.no_grad(), traced(model) as trace:
        model(input_ids=tokens, use_cache=False)
    return [(sequence.token_ids, sequence.gates[-1]) for sequence in trace.sequences]


def shown(model: nn.Module, data: Data, tokens: torch.Tensor) -> dict[str, Any]:
    ((ids, gates),) = gates_of(model, tokens.to(device_of(model)))
    return {"tokens": [data.tokenizer.decode([i]) for i in ids], "gates": gates.tolist()}
