"""Blocks of tokens to train on."""

import random

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..text.corpora import DOMAINS, Corpora
from ..text.documents import GIVEN, Document
from .tokenizer import encode


LENGTH = 256  # tokens in a training block, and the most that a model is shown at once


def make_blocks(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], desc: str, seed: int, length: int = LENGTH
) -> torch.Tensor:
    """Documents in random order, one after another, cut into blocks: tokens and labels (N, 2, length).

    What is given has the label -100, which the loss leaves out, but in one document of eight: models must know what
    questions of their domain look like, or nothing could tell by a question whose it is; but drawn numbers are noise,
    and learning to predict them all makes sums take more than twice as long to learn.
    """
    tokens: list[int] = []
    labels: list[int] = []
    end = tokenizer.eos_token_id
    order = random.Random(seed).sample(documents, len(documents))
    for start in tqdm(
        range(0, len(order), 512), desc=f"tokenize {desc}", unit="document", unit_scale=512, leave=False
    ):
        batch = order[start : start + 512]
        encoded = iter(encode(tokenizer, [part for document in batch for part in document.parts]))
        for number, document in enumerate(batch):
            tokens.append(end)
            labels.append(end)
            for kind, ids in (next(encoded) for _ in document.parts):
                tokens += ids
                labels += ids if kind != GIVEN or number % 8 == 0 else [-100] * len(ids)
    whole = len(tokens) // length * length
    return torch.tensor([tokens[:whole], labels[:whole]]).view(2, -1, length).transpose(0, 1).contiguous()


def training_blocks(tokenizer: PreTrainedTokenizerFast, corpora: Corpora, seed: int) -> dict[str, torch.Tensor]:
    """Each domain's blocks; `seed` decides the order of the documents."""
    return {domain: make_blocks(tokenizer, corpora.documents["train"][domain], domain, seed) for domain in DOMAINS}
