"""What each option of `StitchConfig` does to quality, cost and file size, on the quickstart's models.

    python benchmarks/options.py

Takes the seed and the experts of `examples/quickstart.py` (run `make quickstart` first; they are trained if they are
not there), trains stitches with one option changed at a time, and writes `benchmarks/results/options.json` and a
table. Scores are averages over the four domains of the accuracy on *validation* data: next tokens for docstrings and
code, exact match for arithmetic and translation. "One removed" is the average score of the other domains after an
expert is left out, without any training, over the choices of that expert. The time of a training step is a ratio to
that of the default options, both measured in turns. One set of models and one seed each: differences of a point or
two are noise.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from transformers.utils import logging

from peft_bts import StitchConfig


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import quickstart as qs


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
class Arguments(qs.Arguments):
    steps: list[int] = field(default_factory=lambda: [100, 400], metadata={"help": "lengths of stitch training"})
    results: str = field(default="benchmarks/results/options.json", metadata={"help": "file to write"})


def measure(options, steps, seed_folder, folders, data, tokenizer):
    """Train stitches with these options; return scores with all experts and with one removed, and sizes."""
    train_blocks, test_blocks, test_documents = data
    set_seed(0)
    config = StitchConfig(task_type="CAUSAL_LM", experts=folders, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(seed_folder), config)
    stage = replace(qs.STAGES["stitch"], steps=steps)
    qs.train(model, qs.mix_blocks(train_blocks, stage.mix, stage.steps * stage.batch), stage, "stitch")
    with tqdm(total=len(qs.DOMAINS) * (1 + len(folders)), desc="evaluate", leave=False) as bar:
        scores = qs.evaluate(model, tokenizer, test_blocks, test_documents, bar)
        without = {}
        for name in folders:
            with model.set_active_experts(set(folders) - {name}):
                rest = qs.evaluate(model, tokenizer, test_blocks, test_documents, bar)
            without[name] = qs.average({domain: score for domain, score in rest.items() if domain != name})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "average": qs.average(scores),
        "one_removed": statistics.mean(without.values()),
        "without": without,
        "domains": {domain: {"loss": loss, "accuracy": accuracy} for domain, (loss, accuracy) in scores.items()},
        "trained_parameters": model.get_nb_trainable_parameters()[0],
        "file_bytes": size,
    }


def time_steps(seed_folder, folders, rows, rounds=15):
    """Seconds of a training step by variant: medians of rounds in which every variant takes its turn."""
    variants = {}
    for name, options in VARIANTS.items():
        config = StitchConfig(task_type="CAUSAL_LM", experts=folders, **options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(seed_folder), config).train()
        variants[name] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = {"input_ids": rows[:8, 0], "labels": rows[:8, 1]}
    seconds = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc="time steps"):
        for name, (model, optimizer) in variants.items():
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}  # the first two warm up


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    documents = qs.make_documents(arguments)
    tokenizer = qs.train_tokenizer(documents["train"])
    train_blocks = qs.make_blocks(tokenizer, documents["train"], "tokenize")
    test_blocks = qs.make_blocks(tokenizer, documents["validation"], "tokenize validation")
    test_blocks = {domain: rows[:: -(-len(rows) // 160)] for domain, rows in test_blocks.items()}
    seed_folder = qs.trained(None, "seed", train_blocks, tokenizer, arguments)
    folders = {name: qs.trained(seed_folder, name, train_blocks, tokenizer, arguments) for name in qs.EXPERTS}

    data = train_blocks, test_blocks, documents["validation"]
    machine = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, options in tqdm(VARIANTS.items(), desc="variants"):
        rows[name] = {str(n): measure(options, n, seed_folder, folders, data, tokenizer) for n in arguments.steps}
        path.write_text(json.dumps({**machine, "versions": versions, "options": rows}, indent=1) + "\n")
    seconds = time_steps(seed_folder, folders, train_blocks["code"])
    results = {**machine, "versions": versions, "options": rows, "seconds_per_step": seconds}
    path.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title="Average validation score by option")
    averages = [f"{steps} steps" for steps in arguments.steps]
    for heading in ("option", *averages, "one removed", "trained weights", "time per step"):
        table.add_column(heading, justify="left" if heading == "option" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[str(steps)]['average']:.1f}" for steps in arguments.steps),
            f"{row[str(arguments.steps[-1])]['one_removed']:.1f}",
            f"{next(iter(row.values()))['trained_parameters']:,}",
            f"{seconds[name] / seconds['default']:.2f}",
        )
    Console().print(table)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
