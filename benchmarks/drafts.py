"""What drafts by the hub (`generate(draft="hub")`) gain: how many are right, by domain, and what they cost.

    make quickstart                                   # trains the models, once
    python -m benchmarks.drafts                       # both parts, one after the other
    python -m benchmarks.drafts --only acceptance     # counts: no need of a quiet machine
    python -m benchmarks.drafts --only cost           # times, at the sizes of benchmarks/speed.py

*Acceptance*: the quickstart's stitched model goes on with test documents of the four domains, greedily or sampling,
with up to 1, 2, 4 or 8 drafts, which may end early, behind a token that the hub gives a probability of less than 0.4,
as is the default of transformers. Counted are new tokens, and forwards of the stitched model by the number of drafts.

*Cost*: a forward of the stitched model over 1 to 9 tokens behind a prompt of 64, and one of the hub alone over one
token, for a hub and three experts of 98M parameters; experts are full models, or LoRAs that run as one batch with it.

A round with d drafts takes d forwards of the hub and a stitched one over 1 + d tokens; without drafts, every token
takes a stitched forward over one. The *gain* is the ratio of the times per token. Prompts are not counted, nor what
`generate()` does between forwards, both in favour of drafts. Writes `benchmarks/results/drafts.json`, and a page.

Predicted before it was first run, for greedy decoding with the best setting: with full experts, 1.4 on docstrings and
code, where the stitched model mostly says what the hub says, and at most 1.1 on arithmetic and translation, whose
answers the hub gets wrong (it is right in 0% of both); with LoRA experts, at most 1.05 on all four, since a stitched
forward then costs less than two of the hub alone.

Found: the prediction was right for docstrings, code and arithmetic beside full experts, and too low for translation,
and for text and code beside LoRA experts. Two drafts at a time are best for most domains, hence the default.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.utils.benchmark import timer
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser, set_seed

from peft_bts import toy

from .measuring import Runner, set_up, take_turns
from .random_models import lora_models, models, token_ids
from .reporting import environment, show, table, write_results
from .speed_parts.presets import PRESETS, Preset


DRAFTS = (1, 2, 4, 8)
# Sampling or not; drafts at most; the probability at which they end.
SETTINGS = [*((False, d, 0.0) for d in DRAFTS), (False, 4, 0.4), (False, 8, 0.4), (True, 4, 0.0), (True, 4, 0.4)]
EXPERTS = {"full": models, "LoRA": lora_models}  # what makes the models whose time is taken
PARTS = ("acceptance", "cost")


@dataclass
class Arguments:
    cache_dir: str = field(default=".cache/quickstart", metadata={"help": "where the quickstart keeps its models"})
    items: int = field(default=12, metadata={"help": "documents of each domain"})
    tokens: int = field(default=32, metadata={"help": "new tokens of each, at most"})
    preset: str = field(default="base", metadata={"help": "sizes of `cost`, as in speed.py", "choices": [*PRESETS]})
    threads: int = field(default=2, metadata={"help": "of the CPU"})
    only: str = field(default="", metadata={"help": "one of the two parts", "choices": ["", *PARTS]})
    results: str = field(default="benchmarks/results/drafts.json", metadata={"help": "file to write"})


# --- Acceptance -----------------------------------------------------------------------------------------------------


class Rounds:
    """Notes how many drafts are in each forward of a model that generates."""

    def __init__(self, model: PeftModel) -> None:
        self._model, self._lengths = model, []
        model.get_base_model().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    def generate(self, prompt: torch.Tensor, **options: Any) -> tuple[int, Counter]:
        """How many new tokens were generated behind a prompt (1, T), and the forwards by number of drafts."""
        self._lengths = []
        made = self._model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        first, *others = self._lengths
        return made.shape[1] - prompt.shape[1], Counter([first - prompt.shape[1], *(length - 1 for length in others)])


def acceptance(rounds: Rounds, prompts: list[torch.Tensor], **options: Any) -> dict[str, Any]:
    """Over all prompts: new tokens, forwards of the stitched model by drafts, tokens per such forward."""
    tokens, forwards = 0, Counter()
    for prompt in prompts:
        made, counted = rounds.generate(prompt, draft="hub", **options)
        tokens, forwards = tokens + made, forwards + counted
    return {
        "tokens": tokens,
        "forwards": {str(drafts): count for drafts, count in sorted(forwards.items())},
        "tokens_per_forward": tokens / forwards.total(),
    }


def toy_prompts(models: toy.Toy, items: int) -> dict[str, list[torch.Tensor]]:
    """Prompts (1, T) by domain: questions of the tasks, and first quarters of blocks of text and code."""
    documents, blocks = models.documents["test"], models.held_out_blocks("test")
    found = {}
    for domain in toy.DOMAINS:
        asked = [
            models.tokenizer(question, return_tensors="pt").input_ids for question, _ in documents[domain][:items]
        ]
        begun = [*blocks[domain][:items, :1, : toy.LENGTH // 4]]
        found[domain] = asked if domain in toy.TASKS else begun
    return found


def accept(arguments: Arguments) -> list[dict[str, Any]]:
    prompts = toy_prompts(toy.Toy(arguments.cache_dir), arguments.items)
    model = AutoPeftModelForCausalLM.from_pretrained(Path(arguments.cache_dir) / "stitched-quickstart").eval()
    rounds, found = Rounds(model), []
    for sample, drafts, threshold in tqdm(SETTINGS, desc="acceptance"):
        for domain in toy.DOMAINS:
            set_seed(0)
            setting = {"num_assistant_tokens": drafts, "assistant_confidence_threshold": threshold}
            options = {"max_new_tokens": arguments.tokens, "do_sample": sample, **setting}
            row = acceptance(rounds, prompts[domain], **options)
            found.append({"domain": domain, "sample": sample, "drafts": drafts, "threshold": threshold, **row})
    return found


# --- Cost -----------------------------------------------------------------------------------------------------------


class Step:
    """A forward over some tokens behind a cached prompt, which is as it was afterwards."""

    def __init__(self, model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> None:
        self.model, self.ids = model, prompt[:, -tokens:]
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=self.cache)

    @torch.no_grad()
    def __call__(self) -> float:
        start = timer()
        self.model(input_ids=self.ids, past_key_values=self.cache)
        elapsed = timer() - start
        self.cache.crop(-self.ids.shape[1])
        return elapsed


def cost(preset: Preset, make: Any) -> dict[str, Any]:
    """Seconds of a stitched forward by number of tokens, and of one of the hub alone over one token."""
    model, hub, _ = make(preset.case)
    prompt = token_ids(preset.case, 1, max(preset.prompt, 1 + max(DRAFTS)))
    lengths = range(1, 2 + max(DRAFTS))
    runners: dict[str, Runner] = {str(tokens): Step(model, prompt, tokens) for tokens in lengths}
    return take_turns({**runners, "hub": Step(hub, prompt, 1)}, {}, budget=preset.seconds, rounds=preset.rounds)


def gain(row: dict[str, Any], seconds: dict[str, float]) -> float:
    """By how much tokens come faster than without drafts."""
    drafted = sum(n * (int(d) * seconds["hub"] + seconds[str(1 + int(d))]) for d, n in row["forwards"].items())
    return row["tokens"] * seconds["1"] / drafted


# --- Both -----------------------------------------------------------------------------------------------------------


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    path = Path(arguments.results)
    results = json.loads(path.read_text()) if path.exists() else {}
    if arguments.only != "cost":
        results["acceptance"] = accept(arguments)
        write_results(results, path)
    if arguments.only != "acceptance":
        preset = PRESETS[arguments.preset]
        results |= environment(preset.case.device) | {"threads": arguments.threads, "preset": arguments.preset}
        results["cost"] = {kind: cost(preset, make) for kind, make in tqdm(EXPERTS.items(), desc="cost")}
        write_results(results, path)
    page = report(results)
    path.with_suffix(".md").write_text(page)
    show(page, width=140)


def report(results: dict[str, Any]) -> str:
    """Tokens per stitched forward, and the gains, by setting and domain."""
    rows = results.get("acceptance", [])
    keys = list(dict.fromkeys((row["sample"], row["drafts"], row["threshold"]) for row in rows))
    by_setting = {key: [r for r in rows if (r["sample"], r["drafts"], r["threshold"]) == key] for key in keys}
    columns: dict[str, Any] = {"tokens per stitched forward": lambda row: row["tokens_per_forward"]}
    for kind, measured in results.get("cost", {}).items():
        columns[f"gain, {kind} experts"] = lambda row, seconds=measured["seconds"]: gain(row, seconds)
    parts = []
    for title, value in columns.items():
        lines = []
        for (sample, drafts, threshold), found in by_setting.items():
            how = "sampling" if sample else "greedy"
            lines.append([how, f"{drafts}, from {threshold:g}", *(f"{value(row):.2f}" for row in found)])
        domains = [toy.DOMAINS[row["domain"]] for row in next(iter(by_setting.values()), [])]
        parts.append(f"## {title[0].upper()}{title[1:]}\n\n" + table(["", "drafts", *domains], lines, left=2))
    for kind, measured in results.get("cost", {}).items():
        seconds = measured["seconds"]
        shares = "; ".join(f"{name}: {value / seconds['1']:.2f}" for name, value in seconds.items())
        parts.append(f"Times of forwards with {kind} experts, in that of one token: {shares}.")
    written = "Written by `python -m benchmarks.drafts`; do not edit. Its first lines say what is counted and timed."
    return "\n\n".join(["# Drafts by the hub", written, *parts]) + "\n"


if __name__ == "__main__":
    main()
