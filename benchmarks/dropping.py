"""What it costs in quality to leave experts out while decoding, and what it saves.

    python -m benchmarks.replicate      # trains the models, once
    python -m benchmarks.dropping

Decodes the test sequences of the replication with its trained Branch-Train-Stitch model, token by token after the
prompt with the right tokens given, under `model.drop_experts`: with at most k experts per sequence, and with a
threshold. Single tasks: arithmetic, translation, docstrings, code. Mixed sequences: blocks that switch domain in the
middle, after the prompt; a translation, code and a sum in a row, of which the translation's question is the prompt.

*Which gates decide* is compared too: those of the last 1, 4 or 16 tokens, in which case experts are called back, or
the mean over the prompt, once and for all. Writes `benchmarks/results/dropping.json`.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser

from peft_bts.inference import dropping

from .measuring import set_up
from .replication.data import Rows
from .replication.jobs import Store
from .replication.presets import EXPERTS, PRESETS
from .replication.studies import Set, folder_of
from .reporting import show, table, write_results


@dataclass
class Arguments:
    preset: str = field(default="quick", metadata={"help": "of the replication", "choices": [*PRESETS]})
    set_number: int = field(default=0, metadata={"help": "which of its sets of models"})
    method: str = field(default="bts", metadata={"help": "which of its stitched models"})
    items: int = field(default=400, metadata={"help": "at most so many test items of every task"})
    blocks: int = field(default=80, metadata={"help": "at most so many test blocks of every domain"})
    cache_dir: str = ".cache/replicate"
    results: str = "benchmarks/results/dropping.json"


# Which gates decide.
LAST = {f"last {tokens}": tokens for tokens in (1, dropping.RECENT, 16)}
PROMPT = "prompt"


@contextmanager
def deciding(gates: str):
    """Have `drop_experts` look at other gates than it does; "prompt": their mean over the prompt, from then on."""
    recent, note = dropping.RECENT, dropping.CatchUpState.note

    def note_prompt(roster, gates_BTN, text_BT):
        if gates_BTN.shape[1] > 1:
            note(roster, gates_BTN, text_BT)

    try:
        dropping.RECENT = LAST.get(gates, 10**6)
        if gates == PROMPT:
            dropping.CatchUpState.note = note_prompt
        yield
    finally:
        dropping.RECENT, dropping.CatchUpState.note = recent, note


class Work:
    """Counts the tokens that experts run over."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        for expert in model.base_model.experts["default"].values():
            expert.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, layer, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[0] * hidden.shape[1]


@torch.no_grad()
def decode(model, rows: Rows, prompt: torch.Tensor, work: Work, limits: dict, batch: int = 100) -> dict:
    """How well the labels after the prompts (N,) are predicted, and how many experts run for a decoded token."""
    exact, right, scored, loss, steps, run = 0, 0, 0, 0.0, 0, 0
    for length in prompt.unique().tolist():
        for places in (prompt == length).nonzero()[:, 0].split(batch):
            tokens, labels = rows.tokens[places], rows.labels[places]
            last = int(((labels != -100) * torch.arange(1, 1 + labels.shape[1])).max())
            cache = DynamicCache()
            with model.drop_experts(**limits) if limits else nullcontext():
                logits = [model(input_ids=tokens[:, :length], past_key_values=cache, logits_to_keep=1).logits]
                before = work.tokens
                for place in range(length, last - 1):
                    logits.append(model(input_ids=tokens[:, place : place + 1], past_key_values=cache).logits)
                run += work.tokens - before
            steps += len(places) * (last - 1 - length)
            logits, targets = torch.cat(logits, dim=1), labels[:, length:last]
            asked = targets != -100
            hits = (logits.argmax(-1) == targets) & asked
            exact += int((hits == asked).all(1).sum())
            right, scored = right + int(hits.sum()), scored + int(asked.sum())
            loss += F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum").item()
    return {
        "exact": 100 * exact / len(rows),
        "token": 100 * right / scored,
        "bits_per_token": loss / scored / math.log(2),
        "experts_per_token": run / steps,
        "n": len(rows),
    }


def before_first_answer(rows: Rows) -> torch.Tensor:
    return (rows.labels != -100).int().argmax(1)


def sequences(one: Set, items: int, blocks: int) -> dict[str, tuple[Rows, torch.Tensor]]:
    """What is decoded, with the lengths of its prompts."""
    test = one.data.rows["test"]
    parts = {name: test[name][:items] for name in ("math", "lang", "three")}
    chosen = {name: (rows, before_first_answer(rows)) for name, rows in parts.items()}
    chosen["three_code"] = test["three_code"][:items], chosen["three"][1]
    for name in ("text_blocks", "code_blocks", "switching"):
        rows = test[name][: blocks * (1 + (name == "switching"))]
        chosen[name] = rows, rows.prompt
    return chosen


def settings(experts: int) -> list[tuple[str, dict]]:
    """(which gates decide, limits), the full model first."""
    ours = f"last {dropping.RECENT}"
    limits = [{"max_active_experts": k} for k in range(experts)] + [{"expert_threshold": t} for t in (0.05, 0.1, 0.2)]
    others = [{"max_active_experts": k} for k in range(1, experts)] + [{"expert_threshold": 0.1}]
    rows = [(ours, {}), *((ours, limit) for limit in limits)]
    return rows + [(gates, limit) for gates in (*LAST, PROMPT) if gates != ours for limit in others]


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(threads=1)
    preset = PRESETS[arguments.preset]
    store = Store(folder_of(Path(arguments.cache_dir), preset, "cpu"))
    one = Set(preset, arguments.set_number, store, "cpu")
    if not store.has(one.name("main", arguments.method, "test")):
        raise SystemExit(
            f"There is no trained {arguments.method!r} in {store.folder}: run `python -m benchmarks.replicate` first."
        )
    model = one.chosen(one.main, arguments.method)
    work = Work(model)
    parts = sequences(one, arguments.items, arguments.blocks)
    results = []
    todo = [(gates, limits, name) for gates, limits in settings(len(EXPERTS)) for name in parts]
    for gates, limits, name in tqdm(todo, unit="measurement"):
        with deciding(gates):
            results.append({"gates": gates, **limits, "data": name, **decode(model, *parts[name], work, limits)})
    settled = {"preset": arguments.preset, "set": arguments.set_number, "method": arguments.method}
    write_results({**settled, "experts": EXPERTS, "rows": results}, Path(arguments.results))
    print("Exact answers in %, or bits per token (experts per token):")
    show(table_of(results, list(parts)), width=180)


# What is shown of each: its title, a figure, and the figure's decimals.
SHOWN = {
    "math": ("arithmetic, %", "exact", 1),
    "lang": ("translation, %", "exact", 1),
    "text_blocks": ("docstrings, bits", "bits_per_token", 2),
    "code_blocks": ("code, bits", "bits_per_token", 2),
    "switching": ("switching, bits", "bits_per_token", 2),
    "three": ("three at once, %", "exact", 1),
    "three_code": ("its code, bits", "bits_per_token", 2),
}


def table_of(results: list[dict], names: list[str]) -> str:
    """A line for every setting: what was decoded, in columns, in the order of `names`, as in `results`."""
    lines = []
    for start in range(0, len(results), len(names)):
        part = results[start : start + len(names)]
        limits = [f"{key}={part[0][key]}" for key in ("max_active_experts", "expert_threshold") if key in part[0]]
        cells = []
        for row in part:
            _, figure, decimals = SHOWN[row["data"]]
            cells.append(f"{row[figure]:.{decimals}f} ({row['experts_per_token']:.1f})")
        lines.append([part[0]["gates"], *(limits or ["none"]), *cells])
    return table(["gates that decide", "limit", *(SHOWN[name][0] for name in names)], lines, left=2)


if __name__ == "__main__":
    main()
