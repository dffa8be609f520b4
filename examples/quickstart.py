"""Branch-Train-Stitch from nothing, on a CPU, in a few minutes.

    python examples/quickstart.py

Everything is made here, nothing is downloaded:

1. a *seed*: a small Llama (0.6M parameters) and its BPE tokenizer, trained on Python's own docstrings and sources,
   with a little arithmetic and a little English-to-Esperanto translation;
2. *branch and train*: three copies of the seed go on alone, one with code, one with arithmetic, one with translation;
3. *stitch*: seed and experts are frozen and joined with `get_peft_model`; `Trainer` trains the stitches only.

Then it prints one table, models x domains: the seed, each expert, the uniform average of their weights, and the
stitched model, on text that none of them has seen. It saves the stitches, shows the folder, loads it again with
`AutoPeftModelForCausalLM` in a fresh process, checks there that the logits are equal, and lets the loaded model
complete a prompt of each domain.

How data and models are made is in `peft_bts.toy`. Seed and experts are kept in `--cache_dir` and used again as long as
their data and settings stay the same; `--fresh` trains them anew. `--smoke` takes only a few steps everywhere, to see
that all parts work.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from peft_bts import StitchConfig, toy


@dataclass
class Arguments:
    cache_dir: str = field(default=".cache/quickstart", metadata={"help": "where seed and experts are kept"})
    output_dir: str = field(default="", metadata={"help": "the adapter's folder [cache_dir/stitched-quickstart]"})
    fresh: bool = field(default=False, metadata={"help": "train seed and experts even if the cache has them"})
    split: str = field(
        default="test", metadata={"help": "what the table is measured on", "choices": ["validation", "test"]}
    )
    threads: int = field(default=2, metadata={"help": "PyTorch's; on a busy machine, 1 is faster than 2"})
    smoke: bool = field(default=False, metadata={"help": "a few steps only: checks that it runs, not that it learns"})
    reload: str = field(default="", metadata={"help": argparse.SUPPRESS})  # for the fresh process at the end


def quickstart(arguments):
    models = toy.Toy(arguments.cache_dir, fresh=arguments.fresh, smoke=arguments.smoke)
    output = Path(arguments.output_dir or models.cache_dir / "stitched-quickstart").resolve()
    clock = Clock()

    with clock("data"):
        test_blocks, test_documents = models.held_out_blocks(arguments.split), models.documents[arguments.split]

    # Branch and train.
    for name in ("seed", *toy.EXPERTS):
        with clock(name):
            models.folder(name)

    # Measure what went in before the stitches: `get_peft_model` changes the seed in place.
    bar = tqdm(total=(len(toy.EXPERTS) + 3) * len(toy.DOMAINS), desc="evaluate")

    def evaluate(model):
        return toy.evaluate(model, models.tokenizer, test_blocks, test_documents, bar)

    with clock("evaluation"):
        seed = AutoModelForCausalLM.from_pretrained(models.folder("seed"))
        experts = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in models.experts.items()}
        scores = {"seed": evaluate(seed)}
        scores |= {f"{name} expert": evaluate(expert) for name, expert in experts.items()}
        scores["weight average"] = evaluate(toy.average_weights([seed, *experts.values()]))

    # Stitch: these few lines are all that `peft_bts` asks for.
    with clock("stitches"):
        model = get_peft_model(seed, StitchConfig(task_type="CAUSAL_LM", experts=models.experts, num_stitches=4))
        model.print_trainable_parameters()
        stage = models.stage("stitch")
        toy.train(model, models.rows(stage), stage, "stitch")
        model.save_pretrained(output)

    with clock("evaluation"):
        scores["stitched"] = evaluate(model)
    bar.close()
    Console().print(toy.score_table(scores, f"Held-out {arguments.split} data"))

    print(f"The adapter, {output}:")
    for path in sorted(output.iterdir()):
        print(f"  {path.stat().st_size:>10,} bytes  {path.name}")

    # A fresh process knows nothing but the folder, and what it has to find.
    with clock("reload"), tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.pt"
        tokens = torch.cat([rows[:2, 0] for rows in test_blocks.values()])
        questions = {"text": ("Return True if", None), "code": ("def __init__(self", None)}  # no one right answer
        questions |= {domain: test_documents[domain][0] for domain in toy.TASKS}
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": model(input_ids=tokens).logits, "questions": questions}, expected)
        command = [sys.executable, __file__, "--output_dir", str(output), "--reload", str(expected)]
        subprocess.run([*command, "--threads", str(arguments.threads)], check=True)  # as many, for the same rounding
    print(clock)

    best = max(scores, key=lambda name: toy.average(scores[name]))
    if best != "stitched" and not arguments.smoke:
        raise SystemExit(f"The stitched model should have the best average, but {best!r} has it.")


def reload(arguments):
    """What somebody does who is given the adapter's folder; run by `quickstart` in a fresh process."""
    model = AutoPeftModelForCausalLM.from_pretrained(arguments.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    expected = torch.load(arguments.reload)
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"]).logits
    if not torch.equal(logits, expected["logits"]):
        difference = (logits - expected["logits"]).abs().max()
        raise SystemExit(f"The reloaded model's logits differ from the saved model's, by up to {difference}.")
    print(f"Reloaded in a fresh process: {logits.numel():,} logits, all equal to those of the trained model.")
    for domain, (prompt, answer) in expected["questions"].items():
        (completion,) = toy.complete(model, tokenizer, [prompt])
        verdict = "" if answer is None else " (right)" if completion == answer else f" (wrong, it is{answer})"
        print(f"[{toy.DOMAINS[domain]}]{verdict}\n{prompt} ->{completion}")


class Clock:
    """Adds up the seconds of each part."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    def __str__(self):
        parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items())
        return f"Seconds: {parts}; together {sum(self.seconds.values()):.0f}."


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.disable_progress_bar()  # of loading and saving, both immediate at this size
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21, transformers 5.23
    if arguments.reload:
        reload(arguments)
    else:
        quickstart(arguments)


if __name__ == "__main__":
    main()
