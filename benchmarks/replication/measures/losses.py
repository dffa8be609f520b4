"""Every token's loss under a model, and what comes of it: bits per byte, answers that are right to the letter."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..tokens.sequences import Sequences


Predictor = Callable[[Tensor, Tensor], Tensor]  # tokens (B, T), prompt lengths (B,) -> logits or log p (B, T, V)


@dataclass
class Losses:
    """Of each token of some sequences: its loss in nats (total,) float32, and whether it was the likeliest (total,).

    Nothing predicts the token that opens a sequence: its loss is 0.
    """

    nats: np.ndarray
    hits: np.ndarray


@torch.no_grad()
def score(predict: Predictor, sequences: Sequences, desc: str, batch: int = 64) -> Losses:
    """The losses of anything that predicts tokens. Sequences of like lengths go together, padded on the right."""
    nats, hits = np.zeros(len(sequences.tokens), np.float32), np.zeros(len(sequences.tokens), bool)
    lengths = np.diff(sequences.starts)
    for rows, tokens in tqdm(sequences.batches(batch), desc=desc, total=-(-len(lengths) // batch), leave=False):
        logits = predict(tokens, torch.from_numpy(sequences.prompt[rows]))[:, :-1].float()
        targets = tokens[:, 1:].to(logits.device)
        loss = logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        right = logits.argmax(-1) == targets
        for place, row in enumerate(rows):
            here = slice(sequences.starts[row] + 1, sequences.starts[row + 1])
            nats[here] = loss[place, : lengths[row] - 1].cpu().numpy()
            hits[here] = right[place, : lengths[row] - 1].cpu().numpy()
    return Losses(nats, hits)


# --- What comes of them ---------------------------------------------------------------------------------------------


def bits_per_byte(nats: np.ndarray, sequences: Sequences, kind: str | None = None) -> float:
    """All scored nats (total,) in bits, over the UTF-8 bytes that they are of; or those of one kind of text."""
    return float(sequences.sums(nats, kind).sum() / math.log(2) / sequences.sums(sequences.bytes, kind).sum())


def exact(hits: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Which sequences are right to the letter, (N,): those that greedy decoding answers so.

    Up to its first mistake, decoding sees the tokens of the right answer.
    """
    return sequences.sums(~hits) == 0
