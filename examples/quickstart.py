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

Seed and experts are kept in `--cache_dir` and used again as long as their data and settings stay the same; `--fresh`
trains them anew. `--smoke` takes only a few steps everywhere, to see that all parts work.
"""

import argparse
import ast
import hashlib
import inspect
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from peft_bts import StitchConfig


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


# --- Settings -------------------------------------------------------------------------------------------------------

LENGTH = 128  # tokens in a training block
VOCABULARY = 512
LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
    "initializer_range": 0.06,  # at this width, the usual 0.02 wastes the first few hundred steps
    "tie_word_embeddings": True,
}
END = "<|end|>"  # opens every document, which also ends the one before


@dataclass
class Stage:
    """What one training run is made of: shares of the domains, steps, blocks per step, peak learning rate."""

    mix: dict[str, float]
    steps: int
    batch: int
    learning_rate: float


DOMAINS = {"text": "docstrings", "code": "code", "math": "arithmetic", "lang": "translation"}
TASKS = ["math", "lang"]  # the domains with right answers
EXPERTS = ["code", "math", "lang"]
SPLITS = ["train", "validation", "test"]

# The seed must have met every domain's format: the stitches ask *its* hidden state which expert to listen to. The
# experts forget much of what they no longer see; a little of the seed's data keeps them from forgetting everything.
STAGES = {
    "seed": Stage({"text": 0.45, "code": 0.45, "math": 0.06, "lang": 0.04}, steps=2000, batch=8, learning_rate=3e-3),
    "code": Stage({"code": 0.9, "text": 0.1}, steps=700, batch=8, learning_rate=2e-3),
    "math": Stage({"math": 0.8, "code": 0.1, "text": 0.1}, steps=800, batch=8, learning_rate=4e-3),
    "lang": Stage({"lang": 0.8, "code": 0.1, "text": 0.1}, steps=400, batch=8, learning_rate=2e-3),
    "stitch": Stage({"text": 0.25, "code": 0.25, "math": 0.25, "lang": 0.25}, steps=400, batch=8, learning_rate=3e-3),
}


def stages(arguments):
    return {name: replace(stage, steps=4) for name, stage in STAGES.items()} if arguments.smoke else STAGES


# --- Data: Python's own sources -------------------------------------------------------------------------------------


def read_python(limit=None, root=None):
    """Docstrings ("text") and the rest of the sources ("code") of the standard library, or `root`, split *by file*.

    A document is a pair (prompt, answer), of which models learn the answer; here all of it, so the prompt is empty.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    if len(files) < 100:
        raise SystemExit(f"found only {len(files)} sources of Python's standard library in {root}; is it installed?")

    # A file's place depends on its name alone, so that another Python version tests on the same modules.
    def digest(path):
        return int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), 16)

    documents = {split: {"text": [], "code": []} for split in SPLITS}
    for path in tqdm(sorted(files, key=digest)[:limit], desc="read sources"):
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates, and files for other versions
            continue
        split = {0: "test", 1: "validation"}.get(digest(path) % 16, "train")
        lines = source.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False)
                if docstring is not None:
                    documents[split]["text"].append(("", inspect.cleandoc(docstring)))
                    for number in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                        lines[number] = None
        documents[split]["code"].append(("", "\n".join(line for line in lines if line is not None)))

    def is_english(text):  # 512 tokens leave no room for other scripts; doctests are code, not prose
        return text.isascii() and ">>>" not in text and len(text) > 60

    for parts in documents.values():
        parts["text"] = [(prompt, text) for prompt, text in parts["text"] if is_english(text)]
        parts["code"] = [(prompt, text) for prompt, text in parts["code"] if text.isascii()]
    return documents


# --- Data: two generated tasks --------------------------------------------------------------------------------------


def arithmetic_tasks(rng):
    """Every 2-digit number plus or minus every digit, as documents (prompt, answer): "47+8=" and "550".

    The answer is zero-padded to three digits, and its units come first, so that a carry is known when it is needed.
    """
    tasks = []
    for a in range(10, 100):
        for b in range(10):
            for sign, result in (("+", a + b), ("-", a - b)):
                tasks.append((f"{a}{sign}{b}=", f"{result:03d}"[::-1]))
    rng.shuffle(tasks)
    return tasks


NOUNS = {
    "dog": "hundo", "cat": "kato", "bird": "birdo", "tree": "arbo", "book": "libro", "house": "domo",
    "friend": "amiko", "boy": "knabo", "girl": "knabino", "teacher": "instruisto", "apple": "pomo", "flower": "floro",
}  # fmt: skip
ADJECTIVES = {
    "big": "granda", "small": "malgranda", "good": "bona", "new": "nova", "old": "malnova", "black": "nigra",
    "green": "verda", "blue": "blua",
}  # fmt: skip
VERBS = {
    ("sees", "see", "saw"): "vid", ("loves", "love", "loved"): "am", ("finds", "find", "found"): "trov",
    ("wants", "want", "wanted"): "vol", ("helps", "help", "helped"): "help", ("draws", "draw", "drew"): "desegn",
}  # fmt: skip


def translation_tasks(rng, count):
    """Different short English sentences and their Esperanto, as documents (prompt, answer).

    Esperanto is regular enough to be written by rule: nouns end in -o, adjectives in -a; both take -j in the plural
    and -n as an object; verbs end in -is, -as, -os for past, present, future; there is no word for "a".
    """

    def noun_phrase(case):
        (noun, nomo), (adjective, adjektivo) = rng.choice([*NOUNS.items()]), rng.choice([*ADJECTIVES.items()])
        plural, definite = rng.random() < 0.5, rng.random() < 0.5
        article = "the " if definite else "" if plural else "an " if adjective[0] in "aeiou" else "a "
        ending = ("j" if plural else "") + case
        english = f"{article}{adjective} {noun}{'s' if plural else ''}"
        return english, f"{'la ' if definite else ''}{adjektivo}{ending} {nomo}{ending}", plural

    tasks = {}
    while len(tasks) < count:
        subject, subjekto, plural = noun_phrase("")
        thing, objekto, _ = noun_phrase("n")
        (singular, base, past), verbo = rng.choice([*VERBS.items()])
        verb, ending = rng.choice([(past, "is"), (base if plural else singular, "as"), (f"will {base}", "os")])
        tasks[f"{subject} {verb} {thing} ="] = f" {subjekto} {verbo}{ending} {objekto}"
    return list(tasks.items())


# --- From documents to blocks of tokens -----------------------------------------------------------------------------


def make_documents(arguments):
    """All documents, as documents[split][domain]."""
    rng = random.Random(0)
    documents = read_python(limit=100 if arguments.smoke else None)
    held_out, drawn = (16, 1_000) if arguments.smoke else (240, 80_000)
    for domain, tasks in (("math", arithmetic_tasks(rng)), ("lang", translation_tasks(rng, drawn))):
        documents["validation"][domain] = tasks[:held_out]
        documents["test"][domain] = tasks[held_out : 2 * held_out]
        # Drawn with replacement: where tasks are few, their order should not repeat, or it would be learned.
        documents["train"][domain] = rng.choices(tasks[2 * held_out :], k=drawn)
    return documents


def train_tokenizer(documents, vocabulary=VOCABULARY):
    """A BPE tokenizer with single digits as tokens, in the form `transformers` wants."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [*map(chr, range(ord("!"), ord("~") + 1)), *"ĠĊĉ"]  # ASCII; ByteLevel writes space, \n and \t so
    # In characters. Arithmetic and translation need few tokens, and with more would take all of them.
    limits = {"text": 1_000_000, "code": 1_000_000, "math": 10_000, "lang": 150_000}
    tokenizer.train_from_iterator(
        ["\n".join(map("".join, documents[domain]))[:limit] for domain, limit in limits.items()],
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_blocks(tokenizer, documents, desc, length=LENGTH):
    """Each domain's documents one after another, cut into blocks: a tensor (blocks, 2, length) of tokens and labels.

    The label of a prompt's token is -100, which the loss leaves out: there is nothing to learn from drawn numbers.
    """
    blocks = {}
    for domain, pairs in documents.items():
        tokens, labels = [], []
        for start in tqdm(range(0, len(pairs), 256), desc=f"{desc} {domain}"):
            prompts, answers = zip(*pairs[start : start + 256])
            prompts = tokenizer(list(prompts))["input_ids"]  # opened by END
            answers = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
            for prompt, answer in zip(prompts, answers):
                tokens += prompt + answer
                labels += prompt[:1] + [-100] * (len(prompt) - 1) + answer
        whole = len(tokens) // length * length
        blocks[domain] = torch.tensor([tokens[:whole], labels[:whole]]).view(2, -1, length).transpose(0, 1)
    return blocks


def mix_blocks(blocks, mix, count):
    """`count` blocks, the domains in the given shares; a domain with too few blocks is gone through again."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for domain, share in mix.items():
        wanted, have = round(share * count), len(blocks[domain])
        passes = [torch.randperm(have, generator=generator) for _ in range(-(-wanted // have))]
        rows.append(blocks[domain][torch.cat(passes)[:wanted]])
    return torch.cat(rows)


# --- Training -------------------------------------------------------------------------------------------------------


class StageBar(ProgressCallback):
    """Trainer's progress bar with the stage's name in front and the loss behind."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def train(model, rows, stage, name):
    """One stage of training, the same for seed, experts and stitches."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written: the caller saves what it wants to keep
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=stage.steps // 20,
            adam_beta2=0.95,  # with 0.999, arithmetic takes much longer to learn
            logging_steps=max(1, stage.steps // 50),
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": tokens, "labels": labels} for tokens, labels in rows],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StageBar(name))
    trainer.train()
    return model.eval()


def trained(start, name, blocks, tokenizer, arguments):
    """Trains a whole model from `start` (a folder, or None for a new model), or finds it in the cache; its folder.

    The folder's name holds a hash of all that makes the model what it is: where it starts, its settings, and the very
    tokens it is trained on. A change of any of them makes another folder.
    """
    stage = stages(arguments)[name]
    rows = mix_blocks(blocks, stage.mix, stage.steps * stage.batch)
    key = hashlib.sha256(f"{start and start.name} {LLAMA} {stage} {sorted(tokenizer.get_vocab().items())}".encode())
    key.update(rows.numpy().tobytes())
    folder = Path(arguments.cache_dir).resolve() / f"{name}-{key.hexdigest()[:12]}"
    if folder.exists() and not arguments.fresh:
        print(f"{name}: from the cache, {folder}")
        return folder

    set_seed(0)
    unfinished = folder.with_name(folder.name + ".unfinished")  # an interrupted run must not leave half a model
    model = train(AutoModelForCausalLM.from_pretrained(start) if start else new_llama(tokenizer), rows, stage, name)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def new_llama(tokenizer):
    special = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **special, **LLAMA))


def average_weights(models):
    """A "model soup": as large as one model, every weight the mean of theirs. No training."""
    states = [model.state_dict() for model in models]
    soup = type(models[0])(models[0].config)
    soup.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
    return soup.eval()


# --- Measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(model, tokenizer, prompts, max_new_tokens=32):
    """Greedy answers to a batch of prompts."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def evaluate(model, tokenizer, blocks, documents, bar):
    """The loss per token and the accuracy in percent, as {domain: (loss, accuracy)}."""
    scores = {}
    for domain in DOMAINS:
        losses, hits = [], []
        for rows in blocks[domain].split(32):
            tokens, labels = rows.unbind(1)
            logits, targets = model(input_ids=tokens).logits[:, :-1], labels[:, 1:]
            logits, targets = logits[targets != -100], targets[targets != -100]
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
            hits += (logits.argmax(-1) == targets).tolist()
        if domain in TASKS:  # only a whole answer counts here, to the letter
            hits = []
            for start in range(0, len(documents[domain]), 80):
                prompts, answers = zip(*documents[domain][start : start + 80])
                completions = complete(model, tokenizer, list(prompts))
                hits += [completion == answer for completion, answer in zip(completions, answers)]
        scores[domain] = sum(losses) / len(losses), 100 * sum(hits) / len(hits)
        bar.update()
    return scores


def average(scores):
    return sum(accuracy for _, accuracy in scores.values()) / len(scores)


def print_table(scores, title):
    """Rows are models, columns are domains; the best of a column is bold."""
    caption = (
        "loss: per token (of the answers). token: next tokens that are right, in %.\n"
        "exact: answers that are right to the letter, in %. average: of the percentages."
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for domain, heading in DOMAINS.items():
        table.add_column(f"{heading}\nloss  {'exact' if domain in TASKS else 'token'}", justify="right", no_wrap=True)
    table.add_column("average", justify="right")

    def bold_if(best, text):
        return f"[bold green]{text}[/]" if best else text

    for model, row in scores.items():
        cells = []
        for domain, (loss, accuracy) in row.items():
            rivals = [other[domain] for other in scores.values()]
            least, most = min(loss for loss, _ in rivals), max(accuracy for _, accuracy in rivals)
            cells.append(f"{bold_if(loss == least, f'{loss:.2f}')}  {bold_if(accuracy == most, f'{accuracy:5.1f}')}")
        best = average(row) == max(map(average, scores.values()))
        table.add_row(model, *cells, bold_if(best, f"{average(row):.1f}"))
    Console().print(table)


# --- The whole story ------------------------------------------------------------------------------------------------


def quickstart(arguments):
    cache = Path(arguments.cache_dir).resolve()
    output = Path(arguments.output_dir or cache / "stitched-quickstart").resolve()
    clock = Clock()

    with clock("data"):
        documents = make_documents(arguments)
        tokenizer = train_tokenizer(documents["train"])
        train_blocks = make_blocks(tokenizer, documents["train"], "tokenize")
        test_blocks = make_blocks(tokenizer, documents[arguments.split], f"tokenize {arguments.split}")
        # 160 blocks (20,000 tokens) measure a domain well enough; take them evenly from all its files.
        enough = 8 if arguments.smoke else 160
        test_blocks = {domain: rows[:: -(-len(rows) // enough)] for domain, rows in test_blocks.items()}
        test_documents = documents[arguments.split]

    # Branch and train.
    with clock("seed"):
        seed_folder = trained(None, "seed", train_blocks, tokenizer, arguments)
    folders = {}
    for name in EXPERTS:
        with clock(name):
            folders[name] = trained(seed_folder, name, train_blocks, tokenizer, arguments)

    # Measure what went in before the stitches: `get_peft_model` changes the seed in place.
    bar = tqdm(total=(len(EXPERTS) + 3) * len(DOMAINS), desc="evaluate")
    with clock("evaluation"):
        seed, *experts = (AutoModelForCausalLM.from_pretrained(folder) for folder in (seed_folder, *folders.values()))
        models = {"seed": seed}
        models |= {f"{name} expert": expert for name, expert in zip(EXPERTS, experts)}
        models["weight average"] = average_weights([seed, *experts])
        scores = {name: evaluate(model, tokenizer, test_blocks, test_documents, bar) for name, model in models.items()}

    # Stitch: these few lines are all that `peft_bts` asks for.
    with clock("stitches"):
        model = get_peft_model(seed, StitchConfig(task_type="CAUSAL_LM", experts=folders, num_stitches=4))
        model.print_trainable_parameters()
        stage = stages(arguments)["stitch"]
        train(model, mix_blocks(train_blocks, stage.mix, stage.steps * stage.batch), stage, "stitch")
        model.save_pretrained(output)

    with clock("evaluation"):
        scores["stitched"] = evaluate(model, tokenizer, test_blocks, test_documents, bar)
    bar.close()
    print_table(scores, f"Held-out {arguments.split} data")

    print(f"The adapter, {output}:")
    for path in sorted(output.iterdir()):
        print(f"  {path.stat().st_size:>10,} bytes  {path.name}")

    # A fresh process knows nothing but the folder, and what it has to find.
    with clock("reload"), tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.pt"
        tokens = torch.cat([rows[:2, 0] for rows in test_blocks.values()])
        questions = {"text": ("Return True if", None), "code": ("def __init__(self", None)}  # no one right answer
        questions |= {domain: test_documents[domain][0] for domain in TASKS}
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": model(input_ids=tokens).logits, "questions": questions}, expected)
        command = [sys.executable, __file__, "--output_dir", str(output), "--reload", str(expected)]
        subprocess.run([*command, "--threads", str(arguments.threads)], check=True)  # as many, for the same rounding
    print(clock)

    best = max(scores, key=lambda name: average(scores[name]))
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
        (completion,) = complete(model, tokenizer, [prompt])
        verdict = "" if answer is None else " (right)" if completion == answer else f" (wrong, it is{answer})"
        print(f"[{DOMAINS[domain]}]{verdict}\n{prompt} ->{completion}")


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
