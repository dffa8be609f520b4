"""What one model keeps of a stitched model's gain, distilled into the hub, on the quickstart's models.

    make quickstart                    # the models and the stitches that teach
    python -m benchmarks.distill       # resumes where it was cut off

`examples/distill.py` trains students that start as the seed, on as much of each domain: `distilled`, by the stitched
model's distributions, and `trained`, by the same documents' own next tokens, for comparison. All are measured as the
quickstart measures its models, on its test data. What survives of a gain is (student - seed) / (stitched - seed), in
average scores. One set of models; several students differ in the order of their data. The learning rate is that of
the toy's code expert; nobody searched for a better one.

Students are kept in `--cache_dir`, their scores in `benchmarks/results/distill.json`, with a table in `distill.md`.
Several processes may share the work, each with `--runs` of its own.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser

from peft_bts import toy

from .measuring import set_up
from .reporting import environment, show, table, write_results


SCRIPT = Path(__file__).parents[1] / "examples" / "distill.py"
METHODS = {"distilled": 0.0, "trained": 1.0}  # by their `--data_weight`


@dataclass
class Arguments:
    cache_dir: str = field(default=".cache/quickstart", metadata={"help": "the quickstart's: models and stitches"})
    runs: list[str] = field(
        default_factory=lambda: ["400:0", "400:1", "400:2", "1600:0"],
        metadata={"help": "students of each method, steps:seed"},
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": "which to train"})
    learning_rate: float = 2e-3
    threads: int = field(default=2, metadata={"help": "PyTorch's; on a busy machine, 1 is faster than 2"})
    smoke: bool = field(default=False, metadata={"help": "models of a few steps: checks that it runs"})
    results: str = field(default="benchmarks/results/distill.json", metadata={"help": "file to write"})


def write_documents(models: toy.Toy, folder: Path) -> list[str]:
    """The training documents of every domain as a file; returns the script's `--dataset`."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in models.documents["train"].items():
        text = "".join(json.dumps({"text": prompt + answer}) + "\n" for prompt, answer in documents)
        file = folder / f"{domain}.jsonl"
        if not file.exists() or file.read_text(encoding="utf-8") != text:  # else its packed rows are in the cache
            file.write_text(text, encoding="utf-8")
    return [f"{domain}={folder / domain}.jsonl" for domain in models.documents["train"]]


def train(adapter: Path, datasets: list[str], folder: Path, weight: float, steps: int, seed: int, rate: float) -> None:
    """One student, by the script, in a process of its own."""
    options = {
        "--adapter": adapter,
        "--data_weight": weight,
        "--block_size": toy.LENGTH,
        "--held_out": 20,
        "--max_steps": steps,
        "--seed": seed,
        "--learning_rate": rate,
        "--warmup_steps": steps // 20,
        "--lr_scheduler_type": "cosine",
        "--adam_beta2": 0.95,
        "--per_device_train_batch_size": 8,
        "--save_strategy": "no",
        "--report_to": "none",
        "--logging_steps": max(1, steps // 20),
        "--output_dir": folder,
    }
    flags = [str(part) for pair in options.items() for part in pair]
    subprocess.run([sys.executable, str(SCRIPT), *flags, "--use_cpu", "--dataset", *datasets], check=True)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    models = toy.Toy(arguments.cache_dir, smoke=arguments.smoke)
    adapter = models.cache_dir / "stitched-quickstart"
    if not adapter.is_dir():
        raise SystemExit(f"There is no {adapter}: run examples/quickstart.py with this --cache_dir first.")
    path = Path(arguments.results)
    asked = {"learning_rate": arguments.learning_rate, "smoke": arguments.smoke}
    results = {**environment(), "threads": arguments.threads, **asked, "models": finished(path, asked)}
    blocks, documents = models.held_out_blocks("test"), models.documents["test"]

    def measure(name: str, model: Any, **about: int | str) -> None:
        with tqdm(total=len(blocks), desc=name, leave=False) as bar:
            scores = toy.evaluate(model.eval(), models.tokenizer, blocks, documents, bar)
        domains = {domain: {"loss": loss, "accuracy": accuracy} for domain, (loss, accuracy) in scores.items()}
        measured = {name: {**about, "average": toy.average(scores), "domains": domains}}
        results["models"] = {**finished(path, asked), **measured}  # other processes may have measured others meanwhile
        write_results(results, path)

    if "seed" not in results["models"]:
        measure("seed", AutoModelForCausalLM.from_pretrained(models.folder("seed")))
    if "stitched" not in results["models"]:
        measure("stitched", AutoPeftModelForCausalLM.from_pretrained(adapter))
    datasets = write_documents(models, models.cache_dir / "documents")
    for run in arguments.runs:
        steps, seed = map(int, run.split(":"))
        for method in arguments.methods:
            name = f"{method}, {steps} steps, seed {seed}"
            folder = models.cache_dir / f"{method}-{steps}-{seed}-{arguments.learning_rate}"
            if name in results["models"]:
                continue
            if not (folder / "eval_results.json").exists():  # which the script writes last
                train(adapter, datasets, folder, METHODS[method], steps, seed, arguments.learning_rate)
            student = AutoModelForCausalLM.from_pretrained(folder)
            measure(name, student, method=method, steps=steps, seed=seed)
    page = report(finished(path, asked))
    path.with_suffix(".md").write_text(page + "\n")
    show(page)
    print(f"Wrote {path} and {path.with_suffix('.md')}")


def finished(path: Path, asked: dict) -> dict:
    """The models that a file has results of; all must be of these arguments."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    if {key: before[key] for key in asked} != asked:
        raise SystemExit(f"{path} has results of other arguments; remove it, or name another with --results.")
    return before["models"]


def report(models: dict) -> str:
    """The page: a line for each model, students of one method and length together."""
    seed, stitched = models["seed"]["average"], models["stitched"]["average"]
    groups: dict[tuple[str, int], list[dict]] = {}
    for model in models.values():
        if "method" in model:
            groups.setdefault((model["method"], model["steps"]), []).append(model)
    rows = [line("seed", [models["seed"]], seed, stitched), line("stitched", [models["stitched"]], seed, stitched)]
    rows += [
        line(f"{method}, {steps:,} steps", group, seed, stitched) for (method, steps), group in sorted(groups.items())
    ]
    head = ["model", "students", "average score, %", "gain that survives", *(f"{d}: loss, %" for d in toy.DOMAINS)]
    return "\n".join(
        [
            "# Distilled into one model",
            "",
            "Made by `python -m benchmarks.distill`. Students start as the seed, and cost as much as it: about a "
            "quarter of the stitched model. *distilled*: by the stitched model's distributions; *trained*: on the "
            "same documents' own next tokens. Averages are means over students that differ in the order of their "
            "data, with the smallest and the largest. The gain that survives is (student - seed) / (stitched - seed), "
            "in averages over the domains.",
            "",
            table(head, rows),
        ]
    )


def line(name: str, group: list[dict], seed: float, stitched: float) -> list[str]:
    averages = [model["average"] for model in group]
    mean = statistics.mean(averages)
    spread = f" ({min(averages):.1f} to {max(averages):.1f})" if len(averages) > 1 else ""
    cells = []
    for domain in toy.DOMAINS:
        loss, accuracy = (statistics.mean(m["domains"][domain][key] for m in group) for key in ("loss", "accuracy"))
        cells.append(f"{loss:.2f}, {accuracy:.1f}")
    return [
        name,
        str(len(group)) if name not in ("seed", "stitched") else "",
        f"{mean:.1f}{spread}",
        f"{100 * (mean - seed) / (stitched - seed):.0f}%",
        *cells,
    ]


if __name__ == "__main__":
    main()
