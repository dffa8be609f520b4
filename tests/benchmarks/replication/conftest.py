"""Corpora of tiny archives, a tokenizer of them, and random models."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.replication.text.building import build
from benchmarks.replication.text.sources import SOURCES
from benchmarks.replication.tokens.tokenizer import train_tokenizer
from tests.helpers.study_archives import SIZES, write_archives


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    return build(write_archives(tmp_path_factory.mktemp("sources"), SOURCES), SIZES)


@pytest.fixture(scope="session")
def tokenizer(corpora):
    return train_tokenizer(corpora.documents["train"], vocabulary=400)


@pytest.fixture(scope="session")
def models(tokenizer):
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2, initializer_range=0.3, pad_token_id=0)  # fmt: skip
        made.append(LlamaForCausalLM(config).eval().requires_grad_(False))
    return made
