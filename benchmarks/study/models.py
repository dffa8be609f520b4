"""Seeds and experts: Llamas of three sizes, what each is trained on, and whether an expert has learned its domain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..replication.training import mix, train
from .corpora import Corpora
from .losses import bits_per_byte, score
from .tokens import LENGTH, document_sequences


EXPERTS = ["python", "javascript", "french", "german", "maths"]  # prose is the seed's own domain

# Stitches ask the *seed's* hidden states whom to listen to, so it must have met all domains. Experts keep a little of
# its data, or they would forget the rest altogether.
SEED_MIX = {"prose": 0.35, "python": 0.2, "javascript": 0.15, "french": 0.1, "german": 0.1, "maths": 0.1}
EXPERT_SHARE = 0.8

# Widths, depths, heads and the factor of the first weights; at these widths, the usual 0.02 wastes the first steps.
SIZES = {
    "0.75M": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4,
              "initializer_range": 0.06},
    "2.4M": {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 5,
             "initializer_range": 0.05},
    "5.5M": {"hidden_size": 224, "intermediate_size": 448, "num_hidden_layers": 10, "num_attention_heads": 7,
             "initializer_range": 0.04},
}  # fmt: skip

BATCH = 1024 // LENGTH  # blocks in a step
# An expert has learned its domain where its bits per byte are at most this share of its seed's, on validation text.
LEARNED = {"python": 0.97, "javascript": 0.97, "french": 0.9, "german": 0.9, "maths": 0.7}
TRIES = 3


@dataclass(frozen=True)
class Stage:
    """One training: steps of `BATCH` blocks, and the highest learning rate."""

    steps: int
    learning_rate: float


STAGES = {"seed": Stage(3000, 3e-3), **{expert: Stage(1000, 2e-3) for expert in EXPERTS}, "maths": Stage(2000, 3e-3)}


def mix_of(name: str) -> dict[str, float]:
    """The shares of the domains in what a seed or an expert is trained on."""
    if name == "seed":
        return SEED_MIX
    rest = {domain: share for domain, share in SEED_MIX.items() if domain != name}
    rest = {domain: (1 - EXPERT_SHARE) * share / sum(rest.values()) for domain, share in rest.items()}
    return {name: EXPERT_SHARE, **rest}


def new_model(size: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    sizes = {"num_key_value_heads": SIZES[size]["num_attention_heads"], **SIZES[size]}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=2 * LENGTH, tie_word_embeddings=True,
            bos_token_id=end, eos_token_id=end, pad_token_id=end, **sizes,
        )
    )  # fmt: skip


def branch(
    name: str, model: LlamaForCausalLM, blocks: dict[str, torch.Tensor], stage: Stage, seed: int
) -> dict[str, Any]:
    """Train a seed from nothing, or an expert, which starts as its seed's copy; `seed` decides the order of blocks."""
    rows = mix(blocks, mix_of(name), stage.steps * BATCH, seed)
    model.requires_grad_(True)
    return train(model, rows, steps=stage.steps, learning_rate=stage.learning_rate, desc=name)


def branch_expert(
    name: str,
    seed_folder: Path,
    folder: Path,
    blocks: dict[str, torch.Tensor],
    corpora: Corpora,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    seed: int,
) -> dict[str, Any]:
    """Train an expert, with blocks in another order if it has not learned its domain, up to `TRIES` times.

    Returns:
        The result of the last training, with `tries`, the bits per byte on validation text after each of them, those
        of the seed, and whether it `learned`. The expert is in `folder`, whether it has or not.
    """
    text = document_sequences(tokenizer, corpora.documents["validation"][name])

    def bits(model: LlamaForCausalLM) -> float:
        predict = lambda tokens, prompt: model(input_ids=tokens.to(model.device), use_cache=False).logits  # noqa: E731
        return bits_per_byte(score(predict, text, name).nats, text)

    bits_of_seed, tries = bits(LlamaForCausalLM.from_pretrained(seed_folder).eval()), []
    while not tries or (tries[-1] > LEARNED[name] * bits_of_seed and len(tries) < TRIES):
        model = LlamaForCausalLM.from_pretrained(seed_folder)
        result = branch(name, model, blocks, stage, seed + 1000 * len(tries))
        tries.append(bits(model))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    learned = tries[-1] <= LEARNED[name] * bits_of_seed
    return {**result, "tries": tries, "seed": bits_of_seed, "learned": learned}
