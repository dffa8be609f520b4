"""What each option of `StitchConfig` does to quality, cost and file size, on the quickstart's models.

    python -m benchmarks.options

Takes the seed and the experts of `peft_bts.toy` (from the quickstart's cache; they are trained if they are not there),
trains stitches of the paper's form (`output="hub"`) with one option changed at a time, and writes
`benchmarks/results/options.json` and a table. Scores are averages over the four domains of the accuracy on validation
data: next tokens for docstrings and code, exact match for arithmetic and translation. "One removed" is the average
score of the other domains after an expert is left out, without any training, over the choices of that expert. The time
of a training step is a ratio to that of the paper's form, both measured in turns. One set of models and one seed each:
differences of a point or two are noise.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch.utils.benchmark import timer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed

from peft_bts import StitchConfig, toy

from .measuring import Runner, set_up, take_turns
from .reporting import environment, show, table, write_results


VARIANTS = {
    "default": {},
    "gate='token'": {"gate": "token"},
    "gate='token', r=8": {"gate": "token", "r": 8},
    "r=8": {"r": 8},
    "pattern='experts_into_hub'": {"pattern": "experts_into_hub"},
    "expert_streams='projected'": {"expert_streams": "projected"},
    "gate_bias=False": {"gate_bias": False},
    "gate_dropout=0.1": {"gate_dropout": 0.1},
    "num_stitches=1": {"num_stitches": 1},
    "num_stitches=2": {"num_stitches": 2},
    "num_stitches=6": {"num_stitches": 6},
    "init_weights=False": {"init_weights": False},
}


@dataclass
class Arguments:
    cache_dir: str = field(default=".cache/quickstart", metadata={"help": "where seed and experts are kept"})
    steps: list[int] = field(default_factory=lambda: [100, 400], metadata={"help": "lengths of stitch training"})
    variants: list[str] = field(default_factory=lambda: [*VARIANTS], metadata={"help": "which to compare"})
    threads: int = field(default=2, metadata={"help": "PyTorch's; on a busy machine, 1 is faster than 2"})
    smoke: bool = field(default=False, metadata={"help": "models of a few steps: checks that it runs"})
    results: str = field(default="benchmarks/results/options.json", metadata={"help": "file to write"})


def stitch(models: toy.Toy, options: dict) -> PeftModel:
    config = StitchConfig(task_type="CAUSAL_LM", experts=models.experts, output="hub", **options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(models.folder("seed")), config)


def measure(models: toy.Toy, blocks: dict[str, torch.Tensor], options: dict, steps: int) -> dict:
    """Train stitches with these options; return scores with all experts and with one removed, and sizes."""
    set_seed(0)
    model = stitch(models, options)
    stage = replace(toy.STAGES["stitch"], steps=steps)
    toy.train(model, models.rows(stage), stage, "stitch")
    with tqdm(total=len(toy.DOMAINS) * (1 + len(toy.EXPERTS)), desc="evaluate", leave=False) as bar:

        def evaluate() -> toy.Scores:
            return toy.evaluate(model, models.tokenizer, blocks, models.documents["validation"], bar)

        scores, without = evaluate(), {}
        for name in toy.EXPERTS:
            with model.set_active_experts({*toy.EXPERTS} - {name}):
                rest = evaluate()
            without[name] = toy.average({domain: score for domain, score in rest.items() if domain != name})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "average": toy.average(scores),
        "one_removed": statistics.mean(without.values()),
        "without": without,
        "domains": {domain: {"loss": loss, "accuracy": accuracy} for domain, (loss, accuracy) in scores.items()},
        "trained_parameters": model.get_nb_trainable_parameters()[0],
        "file_bytes": size,
    }


def training_step(models: toy.Toy, options: dict) -> Runner:
    model = stitch(models, options).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens, labels = models.blocks["code"][:8].unbind(1)

    def run() -> float:
        start = timer()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return timer() - start

    return run


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    models = toy.Toy(arguments.cache_dir, smoke=arguments.smoke)
    blocks, path = models.held_out_blocks("validation"), Path(arguments.results)
    results = {**environment(), "threads": arguments.threads, "options": {}}
    variants = {name: VARIANTS[name] for name in arguments.variants}
    for name, options in tqdm(variants.items(), desc="variants"):
        results["options"][name] = {str(n): measure(models, blocks, options, n) for n in arguments.steps}
        write_results(results, path)
    runners = {name: training_step(models, options) for name, options in variants.items()}
    seconds = take_turns(runners, {}, budget=math.inf, rounds=(15, 15))["seconds"]
    write_results({**results, "seconds_per_step": seconds}, path)

    lines = []
    for name, row in results["options"].items():
        last = row[str(arguments.steps[-1])]
        averages = [f"{row[str(steps)]['average']:.1f}" for steps in arguments.steps]
        relative = f"{seconds[name] / next(iter(seconds.values())):.2f}"
        lines.append([name, *averages, f"{last['one_removed']:.1f}", f"{last['trained_parameters']:,}", relative])
    averages = [f"{steps} steps" for steps in arguments.steps]
    show(table(["average score", *averages, "one removed", "trained weights", "time per step"], lines))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
