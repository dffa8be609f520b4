"""How large everything is that is measured."""

from dataclasses import dataclass, field, replace

from ..random_models import MIXTURES, PATTERNS, Case


CPU = Case()
CUDA = Case(device="cuda", dtype="bfloat16")
SCALING = {"experts": (1, 7), "stitches": (1, 2, 12), "width": (256, 512), "length": (64, 128, 256, 512)}


@dataclass(frozen=True)
class Preset:
    case: Case = CPU
    prefill: tuple = ((1, 256), (1, 1024), (4, 256), (4, 1024))  # (sequences, tokens)
    decode: tuple = (1, 8)  # sequences
    prompt: int = 64
    tokens: int = 16  # decoded per round
    training: tuple = (2, 256)
    vocabularies: tuple = (32_000,)  # to train with besides; experts have heads only in full training
    train_one_of_all: bool = False  # full training: time one model and multiply, where they do not fit together
    scaling: dict = field(default_factory=lambda: SCALING)  # one size at a time, around the case
    stitch_dtypes: tuple = ("float32",)
    processes: tuple = (
        *(f"{what}, {pattern}" for what in ("inference", "training") for pattern in PATTERNS),
        "inference, models alone",
        "training, full",
        "training, LoRA",
        *(f"training, {kind}, vocabulary of 128000" for kind in ("alternating", *MIXTURES)),
    )
    seconds: float = 90.0  # that a row may take, beyond its least number of rounds
    scaling_seconds: float = 8.0
    rounds: tuple = (9, 30)  # at least, at most
    sections: str = (
        "prefill,decode,training,plain,lora,streams,processes,dropping,mixture,memory,attaching,scaling,sizes"
    )


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
        processes=(
            *(name.replace("128000", "256") for name in Preset.processes),
            "training, alternating, checkpointed",
            "decode, alternating",
        ),
        seconds=0.1,
        scaling_seconds=0.05,
        rounds=(1, 2),
        sections=f"{Preset.sections},compiled,lora_compiled",
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
        sections="compiled,prefill,decode,training,streams,dropping,mixture,memory",
    ),
    # Four models of 8B parameters, on one card.
    "large": Preset(
        case=replace(CUDA, width=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128_256),
        training=(1, 2048),
        vocabularies=(),
        tokens=64,
        processes=(
            "decode, alternating",
            *(f"training, {p}{how}" for how in (", checkpointed", "") for p in PATTERNS),
        ),
        sections="memory",
    ),
    # LoRA experts of a hub of 8B parameters, whose weights are there once.
    "lora": Preset(
        case=replace(CUDA, width=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128_256),
        prefill=((1, 2048),),
        tokens=64,
        sections="lora,lora_compiled",
    ),
}
