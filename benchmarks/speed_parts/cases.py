"""Sizes of models and of measurements, and models of random weights."""

import copy
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bts import StitchConfig


PATTERNS = ("alternating", "experts_into_hub")


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


@dataclass(frozen=True)
class Preset:
    case: Case = Case()
    prefill: tuple = ((1, 256), (1, 1024), (4, 256), (4, 1024))  # (sequences, tokens)
    decode: tuple = (1, 8)  # sequences
    prompt: int = 64
    tokens: int = 16  # decoded per round
    training: tuple = (2, 256)
    vocabularies: tuple = (32_000,)  # to train with besides; experts have heads only in full training
    train_one_of_all: bool = False  # full training: time one model and multiply, where they do not fit together
    scaling: dict = field(
        default_factory=lambda: {
            "experts": (1, 7),
            "stitches": (1, 2, 12),
            "width": (256, 512),
            "length": (64, 128, 256, 512),
        }
    )
    stitch_dtypes: tuple = ("float32",)
    processes: tuple = (
        *(f"{what}, {pattern}" for what in ("inference", "training") for pattern in PATTERNS),
        "inference, models alone",
        "training, full",
        "training, LoRA",
    )
    seconds: float = 90.0  # that a row may take, beyond its least number of rounds
    scaling_seconds: float = 8.0
    rounds: tuple = (9, 30)  # at least, at most
    sections: str = "prefill,decode,training,plain,streams,dropping,memory,attaching,scaling,sizes"


CUDA = Case(device="cuda", dtype="bfloat16")
PRESETS = {
    "base": Preset(),
    # A few seconds of everything, also of what is meant for GPUs: that it runs, not what it costs.
    "smoke": Preset(
        case=Case(width=64, layers=4, heads=2, kv_heads=1, intermediate=96, vocabulary=64, experts=2, stitches=2),
        prefill=((1, 8), (2, 16)),
        decode=(1, 2),
        prompt=4,
        tokens=3,
        training=(2, 8),
        vocabularies=(128,),
        scaling={"experts": (1,), "stitches": (1, 4), "width": (128,), "length": (4, 8, 16)},
        processes=(*Preset.processes, "training, alternating, checkpointed", "decode, alternating"),
        seconds=0.1,
        scaling_seconds=0.05,
        rounds=(1, 2),
        sections=f"{Preset.sections},compiled",
    ),
    # The paper's models (appendix A): 2.7B parameters without embeddings.
    "paper": Preset(
        case=replace(
            CUDA, width=3072, layers=20, heads=24, kv_heads=1, intermediate=12288, vocabulary=128_000, tied=True
        ),
        prefill=((1, 2048), (4, 2048)),
        tokens=64,
        training=(1, 2048),
        vocabularies=(),
        train_one_of_all=True,
        stitch_dtypes=("float32", "bfloat16"),
        processes=tuple(name for name in Preset.processes if name != "training, full"),
        sections="compiled,prefill,decode,training,streams,dropping,memory",
    ),
    # Four models of 8B parameters, on one card.
    "large": Preset(
        case=replace(CUDA, width=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128_256),
        training=(1, 2048),
        vocabularies=(),
        tokens=64,
        processes=(
            "decode, alternating",
            *(f"training, {pattern}{more}" for more in (", checkpointed", "") for pattern in PATTERNS),
        ),
        sections="memory",
    ),
}


# --- Models ---------------------------------------------------------------------------------------------------------


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


def stitched(case: Case, hub, experts, pattern: str = "alternating") -> PeftModel:
    """A stitched model of these very models, with random stitches."""
    config = StitchConfig(task_type="CAUSAL_LM", num_stitches=case.stitches, pattern=pattern, init_weights=False)
    model = get_peft_model(hub, config, autocast_adapter_dtype=case.stitch_dtype == "float32")
    for number, expert in enumerate(experts):
        model.attach_expert(f"e{number}", expert)
    return model.eval()


def models(case: Case) -> tuple[PeftModel, LlamaForCausalLM, list[LlamaForCausalLM]]:
    """A stitched model; its hub (a copy of it) and its experts (the same objects), to be run alone."""
    hub, *experts = llamas(case)
    return stitched(case, copy.deepcopy(hub), experts), hub, experts


def lora(case: Case) -> PeftModel:
    return get_peft_model(llama(case), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))


def to_train(case: Case, kind: str) -> list[torch.nn.Module]:
    """The models of which a training step of some kind consists: "LoRA", "full", or a pattern of stitches."""
    if kind == "LoRA":
        return [lora(case)]
    hub, *experts = llamas(case)
    if kind == "full":
        return [model.requires_grad_(True) for model in (hub, *experts)]
    return [stitched(case, hub, experts, kind)]


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def token_ids(case: Case, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(case.vocabulary, (batch, length), generator=generator).to(case.device)
