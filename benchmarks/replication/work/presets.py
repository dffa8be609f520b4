"""How large the study is: models, trainings, tests, and in which order its parts are run."""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..branching.models import BATCH, EXPERTS, SEED_MIX, STAGES, TRIES, Stage
from ..text.corpora import Sizes
from ..tokens.blocks import LENGTH
from ..tokens.tokenizer import VOCABULARY


# What combinations are trained on: half of it what the seed was trained on, half what the experts were.
STITCH_MIX = {domain: 0.5 * SEED_MIX[domain] + 0.1 * (domain in EXPERTS) for domain in SEED_MIX}
CROSS_EXPERTS = ["french", "maths"]

# Learning rates to choose from: gates alone are few weights far from where they should be, whole models many weights
# nearly there. The router by sequence was still getting better at the highest of three.
RATES = (1e-3, 3e-3, 1e-2)
GATE_RATES = (3e-3, 1e-2, 3e-2)
ROUTING_RATES = (1e-2, 3e-2, 1e-1, 3e-1)
WHOLE_RATES = (3e-4, 1e-3, 3e-3)
OWN_RATES = {
    **dict.fromkeys(("outputs", "outputs_evidence", "token_router", "outputs_switches"), GATE_RATES),
    "routing": ROUTING_RATES,
    **dict.fromkeys(("dense", "dense_maths", "btx_soft", "btx_sample"), WHOLE_RATES),
}
SHARES = (0.25, 0.5, 1.0)  # of the steps, after which methods are looked at

# Ours that the verdict is about, and what they have to beat.
FORMS = ("outputs", "bts", "bts_outputs", "bts_token_r8_outputs", "outputs_evidence")
SIMPLE = ("soup", "btm", "btm_forgetting", "btm_forgetting_fast", "routing", "token_router", "dense")
MAIN = (*SIMPLE, *FORMS)
RIVALS = ("btx_soft", "btx_sample", "bam_adapters", "lora")  # of the paper, besides the simple ways
# What the defaults of `StitchConfig` are to be set by, beside the forms that they are variants of; and further ones.
VARIANTS = ("bts", "bts_outputs", "bts_k1", "bts_kL", "bts_experts_into_hub", "bts_init_near_seed", "bts_outputs_k1",
            "bts_outputs_experts_into_hub", "bts_outputs_init_near_seed")  # fmt: skip
CROSS_VARIANTS = ("bts", "bts_outputs", "bts_k1", "bts_experts_into_hub", "bts_outputs_k1",
                  "bts_outputs_experts_into_hub")  # fmt: skip
MORE_VARIANTS = ("bts_token", "bts_token_r8", "bts_projected", "bts_k2", "bts_hub_maths", "bts_init_torch")
CROSS_FORMS = tuple(form for form in FORMS if form != "outputs_evidence")  # its questions know no other domain
CROSS = (*SIMPLE, "dense_maths", *CROSS_FORMS)
CROSS_LONG = ("dense", "dense_maths", "btx_soft", "bam_adapters", "bts_outputs", "bts_outputs_hub_maths", "bts",
              "bts_experts_into_hub")  # fmt: skip
TREND = ("btm", "btm_forgetting", "btm_forgetting_fast", "routing", "outputs", "outputs_evidence", "bts",
         "bts_outputs")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One table of the study: which methods combine the models of so many sets, and what they are for.

    `kind`: "main" (all experts, all domains), "cross" (two experts, word problems in French) or "prompts" (the
    methods of "main" once more, tested with four solved examples and by the answers that they write).
    """

    name: str
    kind: str
    methods: tuple[str, ...]
    sets: int
    size: str = "0.75M"
    lora: bool = False  # experts trained as LoRAs
    items: int = 2000  # of the cross task, to be trained on
    steps: int | None = None  # of all methods; `None`: the preset's

    @property
    def table(self) -> str:
        """The table that its methods stand in; several parts may fill one."""
        kind = "main" if self.kind == "prompts" else self.kind
        steps = f"x{self.steps}" if self.steps else ""
        return kind + ("_lora" if self.lora else "") + (f"{self.items}" if kind == "cross" else "") + steps

    @property
    def results_key(self) -> str:
        """Of the cross task: the name of its table in the results."""
        return f"{self.items}" + (f" for {self.steps} steps" if self.steps else "")


@dataclass(frozen=True)
class Preset:
    """Sizes of one run. The first `together` parts, which decide the verdict, are done set by set, so that a run that
    ends early has whole sets. Then come the others in their order, on the first set, then on the second.

    Attributes:
        tries: How often an expert is trained at most until it has learned its domain.
        tuned_sets: On so many sets of each part every method tries three learning rates. Further sets take the rate
            that did best there, on average, on validation text.
        rates: How many rates are tried: 3, or 1, the middle one.
        validation: Documents of each domain, and half as many items, on which learning rates are chosen.
        test: The same for tests, of mixed documents as many; `None`: all.
        asked: Items of each task that are asked without examples.
        prompted: Items of each task that are asked behind four examples in the part "prompts".
        prompt_length: Tokens that such a question may take.
    """

    parts: tuple[Part, ...]
    together: int = 2
    stages: dict[str, Stage] = field(default_factory=lambda: dict(STAGES))
    tries: int = TRIES
    steps: int = 300
    cross_steps: int = 250
    batch: int = BATCH
    tuned_sets: int = 1
    rates: int = 3
    vocabulary: int = VOCABULARY
    length_of_routing: int = 20  # epochs that the router by sequence is trained
    validation: int = 40
    test: int | None = 200
    asked: int = 1000
    prompted: int = 1000
    prompt_length: int = LENGTH
    corpora: Sizes = field(default_factory=Sizes)

    @property
    def key(self) -> str:
        """Of everything but the parts: more of them go on where fewer ended."""
        sizes = {name: value for name, value in asdict(self).items() if name not in ("parts", "together")}
        return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:8]

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of how models were made."""
        return {
            "size": self.parts[0].size, "steps": self.steps, "cross_steps": self.cross_steps, "batch": self.batch,
            "tuned_sets": self.tuned_sets, "rates": self.rates,
            "stages": {name: [stage.steps, stage.learning_rate] for name, stage in self.stages.items()},
        }  # fmt: skip

    def rates_of(self, method: str) -> tuple[float, ...]:
        rates = OWN_RATES.get(method, RATES)
        return rates if self.rates == 3 else (rates[1],)


FULL = Preset(
    (
        # What decides the verdict comes first.
        Part("main", "main", MAIN, sets=5),
        Part("cross", "cross", CROSS, sets=5),
        # First sets of all others follow, then second ones.
        Part("evidence", "main", ("bts_outputs_evidence",), sets=2),
        Part("switches", "main", ("outputs_switches", "bts_outputs_switches"), sets=2),
        Part("rivals", "main", RIVALS, sets=2),
        Part("cross_long", "cross", CROSS_LONG, sets=2, steps=1000),
        Part("cross200", "cross", ("dense", "dense_maths", *CROSS_FORMS), sets=2, items=200),
        Part("variants", "main", VARIANTS, sets=2),
        Part("cross_variants", "cross", CROSS_VARIANTS, sets=2),
        Part("size0.3M", "main", TREND, sets=2, size="0.3M"),
        Part("prompts", "prompts", MAIN, sets=2),
        Part("lora", "main", TREND, sets=2, lora=True),
        Part("more_variants", "main", ("bts", *MORE_VARIANTS), sets=2),
        Part("size2.4M", "main", TREND, sets=2, size="2.4M"),
    )
)
QUICK = replace(
    FULL,
    parts=(
        Part("main", "main", MAIN, sets=1),
        Part("cross", "cross", ("btm", "routing", "dense", "outputs", "bts", "bts_outputs"), sets=1),
    ),
    stages={name: replace(stage, steps=stage.steps // 2) for name, stage in STAGES.items()},
    tries=2,
    steps=100,
    cross_steps=100,
    rates=1,
    length_of_routing=10,
    validation=30,
    test=100,
    asked=300,
)
PRESETS = {
    "quick": QUICK,
    "full": FULL,
    # Larger models on one GPU; 16 times the tokens of `full`.
    "gpu": replace(
        FULL,
        parts=tuple(
            replace(part, size="56M", sets=min(part.sets, 3))
            for part in FULL.parts
            if not part.name.startswith("size")
        ),
        stages={
            "seed": Stage(4000, 1e-3, 16 * BATCH),
            **dict.fromkeys(EXPERTS, Stage(1000, 5e-4, 16 * BATCH)),
            "maths": Stage(1500, 7e-4, 16 * BATCH),
        },
        batch=16 * BATCH,
        validation=200,
        test=None,
    ),
    # A few steps of everything: that it runs, not that it learns.
    "smoke": replace(
        FULL,
        parts=(
            Part("main", "main", (*MAIN, "bts_hub_maths", "outputs_switches", "btx_sample"), sets=2, size="smoke"),
            Part("cross", "cross", ("btm", "dense_maths", "bts_outputs"), sets=2, size="smoke"),
            Part("cross_long", "cross", ("dense", "bts_outputs"), sets=1, size="smoke", steps=3),
            Part("prompts", "prompts", ("btm", "routing", "token_router", "outputs"), sets=2, size="smoke"),
            Part("lora", "main", ("btm", "outputs"), sets=1, size="smoke", lora=True),
        ),
        stages={name: Stage(2, 1e-3, 2) for name in STAGES},
        tries=1,
        steps=4,
        cross_steps=2,
        batch=1,
        vocabulary=1000,
        length_of_routing=1,
        validation=2,
        test=4,
        asked=4,
        prompted=2,
        prompt_length=2 * LENGTH,
    ),
}
