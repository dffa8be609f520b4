"""Answers that are written greedily, and how like the right ones they are."""

from collections.abc import Callable

import numpy as np
import torch
from sacrebleu.metrics import CHRF
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..tokens.sequences import Sequences


@torch.no_grad()
def greedy(
    new_stream: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]],
    prompts: list[Tensor],
    end: int,
    desc: str,
    device: str = "cpu",
    longest: int = 64,
    batch: int = 64,
) -> list[list[int]]:
    """What follows each prompt (T,), token by token until `end`, which is left out, or `longest` tokens.

    Prompts of like lengths go together. Nothing is padded: all rows are read as far as the shortest goes; then longer
    ones are given their own next tokens, and shorter ones what was answered.

    Args:
        new_stream: Makes a stream for rows of prompts (B, T), zeros behind them, and their lengths (B,).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    groups = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
    for places in tqdm(groups, desc=desc, leave=False):
        given = pad_sequence([prompts[place] for place in places], batch_first=True).to(device)
        lengths = torch.tensor([len(prompts[place]) for place in places], device=device)
        stream, read = new_stream(given, lengths), int(lengths.min())
        tokens, is_open = given[:, :read], torch.ones(len(places), dtype=torch.bool, device=device)
        while is_open.any():
            tokens = stream(tokens).argmax(-1, keepdim=True)
            answering = read >= lengths
            if not answering.all():
                tokens = torch.where(answering.unsqueeze(1), tokens, given[:, read : read + 1])
            is_open &= ~answering | (tokens.squeeze(1) != end)
            for row in (is_open & answering).nonzero().squeeze(1).tolist():
                answers[places[row]].append(int(tokens[row]))
            read += 1
            is_open &= read < lengths + longest
    return answers


def prompts_of(sequences: Sequences) -> list[Tensor]:
    """The prompts of items, with their examples where they have some."""
    return [torch.from_numpy(ids[:prompt]) for ids, prompt in zip(sequences.of(sequences.tokens), sequences.prompt)]


def chrf(answers: list[str], right: list[str]) -> np.ndarray:
    """Each answer's chrF (n-grams of characters, 0 to 100), (N,), by sacrebleu; a task's score is their mean."""
    metric = CHRF()
    return np.array([metric.sentence_score(answer, [reference]).score for answer, reference in zip(answers, right)])
