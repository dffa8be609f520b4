"""How well anything that predicts tokens does, without generating a single one.

A greedy answer is right to the letter exactly if, with the right answer given, every token of it is the most likely
one: up to its first mistake, generation sees the same prefix. One forward per batch therefore gives both the loss and
the exact matches, and serves models, ensembles and routers alike.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CROSS, DOMAINS, TASKS, Rows
from .ensembles import log_probabilities


Predictor = Callable[[Tensor, Tensor], Tensor]  # tokens (B, T), prompt lengths (B,) -> logits or log p (B, T, V)
Rated = dict[str, dict[str, float]]


def predictor(model: nn.Module) -> Predictor:
    return lambda tokens, prompt: log_probabilities(model, tokens)


@torch.no_grad()
def score(predict: Predictor, rows: Rows, batch: int = 64) -> dict[str, float]:
    """How well the labels of `rows` are predicted.

    Returns:
        `loss` per scored token in nats; `token` accuracy and `exact`ly right rows, both in percent, with standard
        errors `token_se` (rows are the units drawn) and `exact_se`; the number of rows, `n`.
    """
    losses, rates, exact = [], [], []
    length = (rows.labels != -100).int() * torch.arange(1, rows.labels.shape[1] + 1)
    length = length.max(1).values  # after the last scored token, nothing matters
    for places in length.argsort().split(batch):
        part, longest = rows[places], int(length[places].max())
        logits = predict(part.tokens[:, :longest], part.prompt)[:, :-1]
        targets = part.labels[:, 1:longest].to(logits.device)
        scored = targets != -100
        right = (logits.argmax(-1) == targets) & scored
        rates.append(torch.stack([right.sum(1), scored.sum(1)], dim=1).cpu())
        losses.append(F.cross_entropy(logits[scored].float(), targets[scored], reduction="none").cpu())
    (right, scored), n = torch.cat(rates).double().unbind(1), len(rows)
    token, exact = (right.sum() / scored.sum()).item(), (right == scored).double().mean().item()
    residuals = (right - token * scored) / scored.mean()  # of a ratio of sums
    return {
        "loss": torch.cat(losses).mean().item(),
        "token": 100 * token,
        "token_se": 100 * (residuals.square().sum().sqrt() / n).item(),
        "exact": 100 * exact,
        "exact_se": 100 * math.sqrt(exact * (1 - exact) / n),
        "n": n,
    }


def rate_domains(predict: Predictor, rows: dict[str, Rows], tasks: list[str] = TASKS) -> dict:
    """The four domains, and their average: token accuracy where there is no right answer, else exact match.

    `se` is the standard error of the average that comes from the choice of test data.
    """
    domains = {}
    for domain in [*DOMAINS, *(task for task in tasks if task not in DOMAINS)]:
        kind = "exact" if domain in tasks else "token"
        result = score(predict, rows[domain if domain in tasks else f"{domain}_blocks"])
        domains[domain] = {
            "loss": result["loss"], "score": result[kind], "se": result[f"{kind}_se"], "n": result["n"]
        }  # fmt: skip
    return {"domains": domains, **average(domains)}


def average(domains: Rated) -> dict[str, float]:
    return {
        "average": sum(result["score"] for result in domains.values()) / len(domains),
        "se": math.sqrt(sum(result["se"] ** 2 for result in domains.values())) / len(domains),
    }


def rate_all(predict: Predictor, rows: dict[str, Rows]) -> dict:
    """The domains, and what needs several of them in one sequence; the cross task without any training on it."""
    switching = score(predict, rows["switching"])
    three, three_code = (score(predict, rows[name]) for name in ("three", "three_code"))
    return {
        **rate_domains(predict, rows),
        "switching": {"bits_per_token": switching["loss"] / math.log(2), "n": switching["n"]},
        "three": {"exact": three["exact"], "se": three["exact_se"], "code": three_code["token"], "n": three["n"]},
        "cross_untrained": {kind: score(predict, rows[kind]) for kind in CROSS},
    }


def rate_task(predict: Predictor, rows: dict[str, Rows], task: str) -> dict:
    """One task with right answers alone."""
    result = score(predict, rows[task])
    return {"average": result["exact"], "se": result["exact_se"], "loss": result["loss"], "n": result["n"]}
