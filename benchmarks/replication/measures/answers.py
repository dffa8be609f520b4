"""Answers that are written greedily, and how like the right ones they are."""

from collections.abc import Callable

import numpy as np
import torch
from sacrebleu.metrics import CHRF
from torch import Tensor
from tqdm import tqdm

from ..tokens.sequences import Sequences


@torch.no_grad()
def greedy(
    new_stream: Callable[[], Callable[[Tensor], Tensor]],
    prompts: list[Tensor],
    end: int,
    desc: str,
    device: str = "cpu",
    longest: int = 64,
    batch: int = 64,
) -> list[list[int]]:
    """What follows each prompt (T,), token by token until `end`, which is left out, or `longest` tokens.

    Prompts of one length go together, so that nothing is padded.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    groups = [places[i : i + batch] for _, places in sorted(by_length.items()) for i in range(0, len(places), batch)]
    for places in tqdm(groups, desc=desc, leave=False):
        stream, tokens = new_stream(), torch.stack([prompts[place] for place in places]).to(device)
        open_rows = torch.ones(len(places), dtype=torch.bool, device=device)
        for _ in range(longest):
            tokens = stream(tokens).argmax(-1, keepdim=True)
            open_rows &= tokens.squeeze(1) != end
            if not open_rows.any():
                break
            for row in open_rows.nonzero().squeeze(1).tolist():
                answers[places[row]].append(int(tokens[row]))
    return answers


def prompts_of(sequences: Sequences) -> list[Tensor]:
    """The prompts of items, with their examples where they have some."""
    return [torch.from_numpy(ids[:prompt]) for ids, prompt in zip(sequences.of(sequences.tokens), sequences.prompt)]


def chrf(answers: list[str], right: list[str]) -> np.ndarray:
    """Each answer's chrF (n-grams of characters, 0 to 100), (N,), by sacrebleu; a task's score is their mean."""
    metric = CHRF()
    return np.array([metric.sentence_score(answer, [reference]).score for answer, reference in zip(answers, right)])
