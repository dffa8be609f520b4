"""The gates of the last stitch, token by token: a sequence of each domain, and one that passes through all of them."""

from typing import Any

import torch
from torch import nn

from peft_bts import trace_gates

from .data import DOMAINS, TASKS, Data
from .training import device_of


SHOWN = 64  # tokens of a figure
ORDER = ["text", "math", "lang", "code"]  # of the domains in the sequence that passes through all


def measure_gates(model: nn.Module, data: Data) -> dict[str, Any]:
    """Gates of the last stitch on test data, means over channels.

    Returns:
        `models`; `mean`: domain -> model -> mean gate over the domain's test blocks; `prompts`: domain ->
        `tokens` and `gates` (T, models) of one sequence; `switching`: the same of one that switches domain after
        `every` tokens.
    """
    rows = data.rows["test"]
    means, prompts = {}, {}
    for domain in DOMAINS:
        blocks = rows[f"{domain}_blocks"].tokens
        traced = [gates_of(model, part) for part in blocks.split(32)]
        models = traced[0][0]
        gates = torch.cat([gates for _, sequences in traced for _, gates in sequences])
        means[domain] = dict(zip(models, gates.mean(0).tolist()))
        first = rows[domain if domain in TASKS else f"{domain}_blocks"]
        end = int((first.labels[0] != -100).nonzero().max()) + 1
        prompts[domain] = one_sequence(model, data, first.tokens[:1, : min(end, SHOWN)])
    every = SHOWN // len(ORDER)
    pieces = torch.cat([rows[f"{domain}_blocks"].tokens[1:2, :every] for domain in ORDER], dim=1)
    switching = {**one_sequence(model, data, pieces), "order": ORDER, "every": every}
    return {"models": models, "mean": means, "prompts": prompts, "switching": switching}


def gates_of(model: nn.Module, tokens: torch.Tensor) -> tuple[list[str], list[tuple[list[int], torch.Tensor]]]:
    """Names of the models; of every sequence in a batch (B, T), the tokens and the last stitch's gates (T, models)."""
    with torch.no_grad(), trace_gates(model) as trace:
        model(input_ids=tokens.to(device_of(model)), use_cache=False)
    return list(trace.stitches[-1].models), [(one.token_ids, one.gates[-1]) for one in trace.sequences]


def one_sequence(model: nn.Module, data: Data, tokens: torch.Tensor) -> dict[str, Any]:
    _, ((ids, gates),) = gates_of(model, tokens)
    return {"tokens": [data.tokenizer.decode([i]) for i in ids], "gates": gates.tolist()}
