"""Models of random weights, which change no time and no memory: a hub, its experts, and stitches between them."""

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bts import StitchConfig


PATTERNS = ("alternating", "experts_into_hub")
MIXTURES = {"mixture": {"output": "mixture"}, "output gates": {"output": "mixture", "num_stitches": 0}}
LORA_RANK = 16  # of experts that are LoRAs of the hub


@dataclass(frozen=True)
class Case:
    """A hub, its experts (all of one shape), the stitches between them, and where they are."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    intermediate: int = 2048
    vocabulary: int = 8192
    tied: bool = False  # one matrix for embeddings and lm_head
    experts: int = 3
    stitches: int = 4  # K
    device: str = "cpu"
    dtype: str = "float32"
    stitch_dtype: str = "float32"  # PEFT's default, whatever the models' is

    def with_width(self, width: int) -> "Case":
        """Another width, with heads of 64 channels and an FFN in proportion."""
        heads, intermediate = width // 64, -(-width * 8 // 3 // 64) * 64
        return replace(self, width=width, heads=heads, kv_heads=heads, intermediate=intermediate)


def llama(case: Case, seed: int = 0) -> LlamaForCausalLM:
    """One model, frozen, in eval mode, made where it shall live."""
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.width // case.heads,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(case.device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, case.dtype))
    return model.eval().requires_grad_(False)


def llamas(case: Case) -> list[LlamaForCausalLM]:
    """The hub and its experts."""
    return [llama(case, seed) for seed in range(1 + case.experts)]


def stitched(case: Case, hub, experts, pattern: str = "alternating", **options) -> PeftModel:
    """A stitched model of these very models, with random stitches, in the paper's form unless `options` say otherwise.

    They are those of `StitchConfig`.
    """
    paper = {"num_stitches": case.stitches, "pattern": pattern, "output": "hub"}
    config = StitchConfig(task_type="CAUSAL_LM", init_weights=False, **paper | options)
    model = get_peft_model(hub, config, autocast_adapter_dtype=case.stitch_dtype == "float32")
    for number, expert in enumerate(experts):
        model.attach_expert(f"e{number}", expert)
    return model.eval()


def models(case: Case, **options) -> tuple[PeftModel, LlamaForCausalLM, list[LlamaForCausalLM]]:
    """A stitched model; its hub (a copy of it) and its experts (the same objects), to be run alone."""
    hub, *experts = llamas(case)
    return stitched(case, copy.deepcopy(hub), experts, **options), hub, experts


def save_loras(case: Case, hub: LlamaForCausalLM, folder: Path) -> None:
    """Save a LoRA of the hub for each expert, with random weights, in `folder`/<name>; the hub is left as it was."""
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, target_modules="all-linear", init_lora_weights=False)
    for number in range(case.experts):
        model = get_peft_model(hub, config)
        model.save_pretrained(folder / f"e{number}")
        model.unload()


def lora_models(case: Case) -> tuple[PeftModel, LlamaForCausalLM, list[LlamaForCausalLM]]:
    """A stitched model whose experts are LoRAs of its hub, on all linear layers; a copy of the hub, to be run alone;
    the experts (the same objects)."""
    hub = llama(case)
    with tempfile.TemporaryDirectory() as folder:
        save_loras(case, hub, Path(folder))
        paths = [str(Path(folder) / f"e{number}") for number in range(case.experts)]
        model = stitched(case, copy.deepcopy(hub), paths)
    experts = model.base_model.experts["default"]
    return model, hub, [experts[f"e{number}"].model.get_base_model() for number in range(case.experts)]


def lora(case: Case) -> PeftModel:
    return get_peft_model(llama(case), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))


def to_train(case: Case, kind: str) -> list[torch.nn.Module]:
    """The models of which a training step of some kind consists: "LoRA", "full", a pattern of stitches, "mixture"
    (stitches and output gates), or "output gates" alone."""
    if kind == "LoRA":
        return [lora(case)]
    hub, *experts = llamas(case)
    if kind == "full":
        return [model.requires_grad_(True) for model in (hub, *experts)]
    return [stitched(case, hub, experts, **MIXTURES.get(kind) or {"pattern": kind})]


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def token_ids(case: Case, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(case.vocabulary, (batch, length), generator=generator).to(case.device)
