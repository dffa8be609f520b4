"""Seeds and experts: Llamas of a few sizes, what each is trained on, and whether an expert has learned its domain."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..measures.losses import bits_per_byte, score
from ..text.corpora import Corpora
from ..tokens.blocks import LENGTH
from ..tokens.sequences import document_sequences
from .training import mix, train


EXPERTS = ["python", "javascript", "french", "german", "maths"]  # prose is the seed's own domain

# Stitches ask the *seed's* hidden states whom to listen to, so it must have met all domains. Experts keep a little of
# its data, or they would forget the rest altogether.
SEED_MIX = {"prose": 0.35, "python": 0.2, "javascript": 0.15, "french": 0.1, "german": 0.1, "maths": 0.1}
EXPERT_SHARE = 0.8

# Widths, depths, heads and the factor of the first weights; at these widths, the usual 0.02 wastes the first steps.
SIZES = {
    "0.3M": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "initializer_range": 0.07},
    "0.75M": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4,
              "initializer_range": 0.06},
    "2.4M": {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 5,
             "initializer_range": 0.05},
    "56M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8,
            "initializer_range": 0.02},
    "smoke": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "initializer_range": 0.06},
}  # fmt: skip

BATCH = 1024 // LENGTH  # blocks in a step
LORA_RANK = 16
# An expert has learned its domain where its bits per byte are at most this share of its seed's, on validation text.
LEARNED = {"python": 0.97, "javascript": 0.97, "french": 0.9, "german": 0.9, "maths": 0.25}
TRIES = 3


@dataclass(frozen=True)
class Stage:
    """One training: steps of `batch` blocks, and the highest learning rate."""

    steps: int
    learning_rate: float
    batch: int = BATCH


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
    rows = mix(blocks, mix_of(name), stage.steps * stage.batch, seed).long()
    model.requires_grad_(True)
    return train(model, rows, steps=stage.steps, learning_rate=stage.learning_rate, desc=name)


def branch_as_lora(
    name: str, model: LlamaForCausalLM, blocks: dict[str, torch.Tensor], stage: Stage, seed: int
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a LoRA of all linear layers on the seed; the result is the model with the LoRA merged into it.

    Its learning rate is three times that of training in full.
    """
    rows = mix(blocks, mix_of(name), stage.steps * stage.batch, seed).long()
    model = model.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    result = train(adapted, rows, steps=stage.steps, learning_rate=3 * stage.learning_rate, desc=name)
    return adapted.merge_and_unload(), result


def branch_expert(
    name: str,
    seed_folder: Path,
    folder: Path,
    blocks: dict[str, torch.Tensor],
    corpora: Corpora,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    seed: int,
    *,
    lora: bool = False,
    tries: int = TRIES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train an expert, with blocks in another order if it has not learned its domain, up to `tries` times.

    Returns:
        The result of the last training, with `tries`, the bits per byte on validation text after each of them, those
        of the seed, and whether it `learned`. The expert is in `folder`, whether it has or not.
    """
    text = document_sequences(tokenizer, corpora.documents["validation"][name])

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(seed_folder).to(device)

    def bits(model: LlamaForCausalLM) -> float:
        predict = lambda tokens, prompt: model(input_ids=tokens.to(model.device), use_cache=False).logits  # noqa: E731
        return bits_per_byte(score(predict, text, name).nats, text)

    bits_of_seed = bits(load().eval())
    found: list[float] = []
    while not found or (found[-1] > LEARNED[name] * bits_of_seed and len(found) < tries):
        model, order = load(), seed + 1000 * len(found)
        if lora:
            torch.manual_seed(order)
            model, result = branch_as_lora(name, model, blocks, stage, order)
        else:
            result = branch(name, model, blocks, stage, order)
        found.append(bits(model.eval()))
    keep(model, tokenizer, folder)
    learned = found[-1] <= LEARNED[name] * bits_of_seed
    return {**result, "tries": found, "seed": bits_of_seed, "learned": learned}


def keep(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both; a kill meanwhile leaves no folder that looks finished."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
