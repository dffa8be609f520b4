"""How large the study is: models, trainings, tests. All results depend on it, so its hash is in the cache's name."""

import hashlib
from dataclasses import asdict, dataclass, field, replace


# What a seed or an expert is trained on. The seed must have met every domain's format: stitches ask *its* hidden state
# whom to listen to. Experts keep a little of the seed's data, or they would forget the rest altogether.
BRANCH_MIX = {
    "seed": {"text": 0.45, "code": 0.45, "math": 0.06, "lang": 0.04},
    "code": {"code": 0.9, "text": 0.1},
    "math": {"math": 0.8, "code": 0.1, "text": 0.1},
    "lang": {"lang": 0.8, "code": 0.1, "text": 0.1},
    "roman": {"roman": 0.8, "code": 0.1, "text": 0.1},
}
EXPERTS = ["code", "math", "lang"]
FOURTH = "roman"  # the expert that is added later; neither the seed nor the stitches have met its domain

# The paper's mix: 15% for each expert's domain, 55% of the seed's own data.
STITCH_MIX = {domain: 0.55 * BRANCH_MIX["seed"][domain] + 0.15 * (domain in EXPERTS) for domain in BRANCH_MIX["seed"]}


@dataclass(frozen=True)
class Preset:
    """Sizes of one run of the study; `sets` independent repetitions of all of it."""

    sets: int = 1
    # Models: a Llama, its vocabulary, and the tokens in a training block.
    llama: dict = field(
        default_factory=lambda: {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.06,  # at this width, the usual 0.02 wastes the first few hundred steps
        }
    )
    vocabulary: int = 512
    length: int = 128
    installed_packages: int = 0  # sources of this many files of installed packages, besides the standard library's
    # Branching: (steps, peak learning rate) of the seed and of every expert.
    branch: dict = field(
        default_factory=lambda: {
            "seed": (2000, 3e-3),
            "code": (700, 2e-3),
            "math": (1000, 4e-3),
            "lang": (350, 2e-3),
            "roman": (350, 2e-3),
        }
    )
    # Combining: the same blocks, steps and number of learning rates for every trained method.
    batch: int = 8
    steps: int = 120
    learning_rates: tuple = (1e-3, 4e-3)
    cross_steps: int = 100
    cross_items: int = 2000  # different training items of the cross task
    long_factor: int = 3  # for the question whether more training would help the cross task
    addition_steps: tuple = (25, 50, 100)
    # Measuring: items of every task, blocks of every domain.
    items: int = 1000
    validation_items: int = 200
    blocks: int = 80
    validation_blocks: int = 40

    @property
    def key(self) -> str:
        """Of everything but the number of sets: more sets of the same sizes go on where fewer ended."""
        sizes = {name: value for name, value in asdict(self).items() if name != "sets"}
        return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:8]


QUICK = Preset()
PRESETS = {
    # One set on two cores.
    "quick": QUICK,
    # Two more sets of the same sizes: what of it was chance?
    "full": replace(QUICK, sets=3),
    # Three sets of 54M-parameter models on one GPU.
    "gpu": replace(
        QUICK,
        sets=3,
        llama={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "initializer_range": 0.02,
        },
        vocabulary=2048,
        length=256,
        installed_packages=6000,
        branch={
            "seed": (4000, 1e-3),
            "code": (1500, 5e-4),
            "math": (1000, 5e-4),
            "lang": (600, 5e-4),
            "roman": (400, 5e-4),
        },
        batch=32,
        learning_rates=(2e-4, 1e-3),
        blocks=240,
    ),
    # A few steps of everything: that it runs, not that it learns.
    "smoke": replace(
        QUICK,
        llama={**QUICK.llama, "hidden_size": 32, "intermediate_size": 64},
        branch=dict.fromkeys(QUICK.branch, (3, 0.001)),
        length=64,
        batch=2,
        steps=2,
        learning_rates=(1e-3,),
        cross_steps=2,
        cross_items=60,
        long_factor=2,
        addition_steps=(1, 2),
        items=12,
        validation_items=8,
        blocks=4,
        validation_blocks=2,
    ),
}
