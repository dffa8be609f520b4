"""A method on the tests, and what is kept of what comes out."""

import torch
from torch import nn

from ..branching.training import autocast, device_of
from ..measures.losses import Losses, Predictor, exact, score
from ..methods.parameters import Method
from ..tokens.sequences import Sequences
from .material import PROTOCOLS, Tests


def predictor_of(method: Method) -> Predictor:
    """Logits of a model, as `losses.score` wants them; ensembles are predictors already."""
    if not isinstance(method, nn.Module):
        return method
    device = device_of(method)

    def predict(tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return method(input_ids=tokens.to(device), use_cache=False).logits

    return predict


def measure(predict: Predictor, tests: Tests) -> dict[str, Losses]:
    # BTM holds the distributions of six models at once.
    return {name: score(predict, sequences, name, batch=16) for name, sequences in tests.items()}


def by_document(name: str, losses: Losses, sequences: Sequences) -> dict[str, object]:
    """What is kept of a test: each document's nats, and, of questions, whether each is right, as "0110..."."""
    kept: dict[str, object] = {"nats": [round(float(nats), 3) for nats in sequences.sums(losses.nats)]}
    if name.startswith(PROTOCOLS):
        kept["right"] = "".join("01"[int(right)] for right in exact(losses.hits, sequences))
    return kept


def sizes_of(tests: Tests) -> dict[str, list[int]]:
    """UTF-8 bytes of what is scored, by document."""
    return {name: [int(size) for size in sequences.sums(sequences.bytes)] for name, sequences in tests.items()}
