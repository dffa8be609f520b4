"""What it costs in quality to leave experts out while decoding, and what it saves.

    python -m benchmarks.replicate      # trains the models, once
    python -m benchmarks.dropping

Decodes test documents and questions of the study with its trained Branch-Train-Stitch model, token by token after the
prompt with the right tokens given, under `model.drop_experts`: with at most k experts per sequence, and with a
threshold. Sums, word problems and text of single domains; mixed text: documents that switch domain in the middle, and
pages that go from prose to code and back.

*Which gates decide* is compared too: output gates over the last 1, 4 or 16 tokens, in which case experts are called
back, or their mean over the prompt, once and for all; and those of the last stitch over the last 4, which decide in
models without output gates. Writes `benchmarks/results/dropping.json`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser

from peft_bts.inference import catching_up
from peft_bts.inference.dropping import DroppingForwardState

from .measuring import set_up
from .replication.methods.registry import TRAINED, is_ours
from .replication.tokens.sequences import Sequences
from .replication.work.combining import Study
from .replication.work.material import Material
from .replication.work.plan import Plan
from .replication.work.presets import PRESETS
from .reporting import show, table, write_results


# Of gates that go by evidence nobody can be left out: an expert that does not run tells nothing.
METHODS = [name for name in TRAINED if is_ours(name) and "evidence" not in name]


@dataclass
class Arguments:
    preset: str = field(default="quick", metadata={"help": "of the study", "choices": [*PRESETS]})
    set_number: int = field(default=0, metadata={"help": "which of its sets of models"})
    method: str = field(
        default="bts_outputs",
        metadata={"help": "which of its stitched models", "choices": [*METHODS]},
    )
    documents: int = field(default=150, metadata={"help": "at most so many of every kind; short ones are more"})
    cache_dir: str = ".cache/replicate"
    results: str = "benchmarks/results/dropping.json"


# What is decoded: its title, the figure that is shown, and the figure's decimals.
SHOWN = {
    "alone/sums": ("sums, %", "exact", 1),
    "alone/stories": ("word problems, %", "exact", 1),
    "text/prose": ("prose, bits per byte", "bits_per_byte", 3),
    "text/python": ("Python, bits", "bits_per_byte", 3),
    "text/french": ("French, bits", "bits_per_byte", 3),
    "mixed/switches": ("switches, bits", "bits_per_byte", 3),
    "mixed/pages": ("pages, bits", "bits_per_byte", 3),
}
PROMPT_TOKENS = 16  # of text without a question
SHORTEST = 24  # tokens that it must have, to be decoded at all

# Which gates decide.
LAST = {f"last {tokens}": tokens for tokens in (1, catching_up.RECENT, 16)}
OF_PROMPT = "prompt"
OF_STITCH = "last stitch"


@contextmanager
def deciding(gates: str):
    """Have `drop_experts` look at other gates than it does; "prompt": their mean over the prompt, from then on."""
    recent, note = catching_up.RECENT, catching_up.CatchUpState.note
    mix, see_output = DroppingForwardState._mix, DroppingForwardState.see_output

    def note_prompt(roster, gates_BTN, text_BT):
        if gates_BTN.shape[1] > 1:
            note(roster, gates_BTN, text_BT)

    def mix_and_note(state, layer, stitch, hub_BTD, states):
        of_last = layer == state.composition.hub_layers - 1
        if of_last and state.composition.mixture and state.catch_up is not None:
            state._note_recent(state.catch_up, stitch.gates(hub_BTD, state.catch_up.names).mean(dim=-1)[..., 1:])
        return mix(state, layer, stitch, hub_BTD, states)

    try:
        catching_up.RECENT = {**LAST, OF_STITCH: recent}.get(gates, 10**6)
        if gates == OF_PROMPT:
            catching_up.CatchUpState.note = note_prompt
        if gates == OF_STITCH:
            DroppingForwardState._mix = mix_and_note
            DroppingForwardState.see_output = lambda *_: None
        yield
    finally:
        catching_up.RECENT, catching_up.CatchUpState.note = recent, note
        DroppingForwardState._mix, DroppingForwardState.see_output = mix, see_output


class Work:
    """Counts the tokens that experts run over."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        for expert in model.base_model.experts["default"].values():
            expert.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, layer, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[0] * hidden.shape[1]


# --- What is decoded ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Sequences of one length with prompts of one length: (B, T) each; `bytes` are 0 where nothing is scored."""

    tokens: torch.Tensor
    scored: torch.Tensor
    bytes: torch.Tensor
    prompt: int


def question_batches(sequences: Sequences, most: int = 100) -> list[Batch]:
    """Questions with their answers. Those of one length go together, so that nothing is padded."""
    alike = defaultdict(list)
    for place, prompt in enumerate(sequences.prompt):
        alike[int(prompt), int(sequences.starts[place + 1] - sequences.starts[place])].append(place)
    return [
        batch_of(sequences, places[i : i + most], prompt, length)
        for (prompt, length), places in sorted(alike.items())
        for i in range(0, len(places), most)
    ]


def text_batches(sequences: Sequences, most: int = 50) -> list[Batch]:
    """Documents of like lengths, cut to the shortest of their batch; those that are too short are left out."""
    lengths = np.diff(sequences.starts)
    order = [int(place) for place in lengths.argsort(kind="stable") if lengths[place] >= SHORTEST]
    parts = [order[i : i + most] for i in range(0, len(order), most)]
    return [batch_of(sequences, places, PROMPT_TOKENS, int(lengths[places[0]])) for places in parts]


def batch_of(sequences: Sequences, places: list[int], prompt: int, length: int) -> Batch:
    def rows(values: np.ndarray) -> torch.Tensor:
        starts = sequences.starts[places]
        return torch.from_numpy(np.stack([values[start : start + length] for start in starts]))

    return Batch(rows(sequences.tokens), rows(sequences.scored), rows(sequences.bytes * sequences.scored), prompt)


def batches(tests: dict[str, Sequences]) -> dict[str, list[Batch]]:
    """What of a study's tests is decoded here."""
    return {name: (question_batches if name.startswith("alone") else text_batches)(tests[name]) for name in SHOWN}


# --- Decoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model, data: Iterable[Batch], work: Work, limits: dict) -> dict:
    """How well what is scored after the prompts is predicted, and how many experts run for a decoded token."""
    rows, exact, right, scored, size, nats, steps, run = 0, 0, 0, 0, 0, 0.0, 0, 0
    for batch in data:
        tokens, length = batch.tokens, batch.prompt
        cache = DynamicCache()
        with model.drop_experts(**limits) if limits else nullcontext():
            logits = [model(input_ids=tokens[:, :length], past_key_values=cache, logits_to_keep=1).logits]
            before = work.tokens
            for place in range(length, tokens.shape[1] - 1):
                logits.append(model(input_ids=tokens[:, place : place + 1], past_key_values=cache).logits)
            run += work.tokens - before
        steps += len(tokens) * (tokens.shape[1] - 1 - length)
        logits, targets, asked = torch.cat(logits, dim=1), tokens[:, length:], batch.scored[:, length:]
        hits = (logits.argmax(-1) == targets) & asked
        rows, exact = rows + len(tokens), exact + int((hits == asked).all(1).sum())
        right, scored = right + int(hits.sum()), scored + int(asked.sum())
        size += int(batch.bytes[:, length:].sum())
        nats += F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum").item()
    return {
        "exact": 100 * exact / rows,
        "token": 100 * right / scored,
        "bits_per_byte": nats / size / math.log(2),
        "experts_per_token": run / steps,
        "n": rows,
    }


def settings(experts: int, stitches: bool) -> list[tuple[str, dict]]:
    """(which gates decide, limits), the full model first; with `stitches`, those of the last one are compared, too."""
    ours = f"last {catching_up.RECENT}"
    limits = [{"max_active_experts": k} for k in range(experts)] + [{"expert_threshold": t} for t in (0.05, 0.1, 0.2)]
    others = [{"max_active_experts": k} for k in range(1, experts)] + [{"expert_threshold": 0.1}]
    rows = [(ours, {}), *((ours, limit) for limit in limits)]
    compared = [gates for gates in (*LAST, OF_PROMPT, *([OF_STITCH] if stitches else [])) if gates != ours]
    return rows + [(gates, limit) for gates in compared for limit in others]


def trained(plan: Plan, number: int, method: str) -> Study:
    """The study's first part on one of its sets.

    Raises:
        SystemExit: If the method, or what it is made of, is not there.
    """
    studies = plan.studies(plan.preset.parts[0])
    if not 0 <= number < len(studies):
        raise SystemExit(f"The preset has {len(studies)} sets, counted from 0; there is no set {number}.")
    study = studies[number]
    files = [study.set.model_job(name).keeps[0] for name in ("seed", *study.experts)]
    done = plan.store.has(study.name(method, "test"))
    if not done or not all(path.exists() for path in [*files, study.weights(method, study.best(method))]):
        raise SystemExit(
            f"The models of set {number} or the trained weights of {method!r} are not in {plan.store.folder}: "
            "run `python -m benchmarks.replicate` first."
        )
    return study


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(threads=1)
    preset, cache = PRESETS[arguments.preset], Path(arguments.cache_dir)
    study = trained(Plan(preset, cache), arguments.set_number, arguments.method)
    model = study.chosen(arguments.method)
    work = Work(model)
    sizes = replace(preset, test=arguments.documents, asked=arguments.documents)
    parts = batches(Material(cache, sizes).test)
    results = []
    config = model.peft_config["default"]
    both = config.output == "mixture" and config.num_stitches != 0
    todo = [(gates, limits, name) for gates, limits in settings(len(study.experts), both) for name in parts]
    for gates, limits, name in tqdm(todo, unit="measurement"):
        with deciding(gates):
            results.append({"gates": gates, **limits, "data": name, **decode(model, parts[name], work, limits)})
    settled = {"preset": arguments.preset, "set": arguments.set_number, "method": arguments.method}
    write_results({**settled, "experts": study.experts, "rows": results}, Path(arguments.results))
    print("Right answers in %, or bits per byte (experts per token):")
    show(table_of(results, list(parts)), width=180)


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
