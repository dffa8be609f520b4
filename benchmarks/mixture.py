"""Output gates against the paper's form, on the quickstart's models.

    python -m benchmarks.mixture

Takes the seed and the experts of `peft_bts.toy` (from the quickstart's cache; they are trained if they are not
there). Trains each form of `FORMS`, with the learning rate whose shortest run has the least loss on validation data,
and measures on test data: losses of the domains, answers to tasks that are asked one at a time, without examples, and
the loss where the domain changes in the middle of a sequence. Baselines without any training stand beside them.
Differences to the paper's form are paired, row by row of the test data, with 95% intervals over rows; one set of
models, one seed each.

Writes `benchmarks/results/mixture.json` and `mixture.md`. What a run has found is kept in the cache, and used again.

Predicted before the first run, after a smaller study: gates alone reach the loss of the paper's form within 0.02 nats
with 0.2% of its weights; stitches with output gates are better than either on switches; BTM is far behind on tasks.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from peft_bts import StitchConfig, toy

from .measuring import set_up
from .replication.data import Rows, block_rows, item_rows, switching_blocks
from .replication.ensembles import BTM
from .replication.evaluation import predictor
from .reporting import environment, show, table, write_results
from .study.bootstrap import interval, paired


SMALL = {"gate": "token", "r": 8}
FORMS = {
    "BTS, the paper's form": {},
    "gates on the outputs alone": {"output": "mixture", "num_stitches": 0},
    "gates on the logits alone": {"gates": "logits"},  # not in the package: measured, and not as good
    "BTS and output gates": {"output": "mixture"},
    "token gates, r=8": SMALL,
    "token gates, r=8, and output gates": SMALL | {"output": "mixture"},
}
SWITCHES = "switches"  # beside the domains

Predictor = Callable[[Tensor, Tensor], Tensor]  # tokens (B, T), prompt lengths (B,) -> logits or log p (B, T, V)


@dataclass
class Arguments:
    cache_dir: str = field(default=".cache/quickstart", metadata={"help": "where seed and experts are kept"})
    steps: list[int] = field(default_factory=lambda: [100, 400], metadata={"help": "lengths of training"})
    rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], metadata={"help": "learning rates to try"}
    )
    threads: int = field(default=2, metadata={"help": "PyTorch's; on a busy machine, 1 is faster than 2"})
    smoke: bool = field(default=False, metadata={"help": "models of a few steps: checks that it runs"})
    results: str = field(default="benchmarks/results/mixture.json", metadata={"help": "file to write"})


@dataclass
class Measured:
    """Of every row of the test data, by domain: what was found, and of how much.

    Attributes:
        nats: The loss, summed over the row's scored tokens.
        tokens: How many these are.
        right: The score: next tokens that are right; for tasks, 1 if the whole answer is right to the letter.
        asked: Of how many.
    """

    nats: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    asked: dict[str, np.ndarray]

    def loss(self) -> float:
        """Nats per token, averaged over domains."""
        return interval({d: self.nats[d][None] for d in toy.DOMAINS}, {d: self.tokens[d] for d in toy.DOMAINS}).value


def rows_of(models: toy.Toy, split: str) -> dict[str, tuple[Rows, Rows]]:
    """By domain, the rows whose loss counts, and those whose answers do."""
    blocks, documents = models.held_out_blocks(split), models.documents[split]
    rows = {domain: block_rows(part) for domain, part in blocks.items()}
    asked = {domain: item_rows(models.tokenizer, documents[domain]) for domain in toy.TASKS}
    switches = block_rows(switching_blocks(blocks, 2 * len(next(iter(blocks.values())))))
    return {name: (part, asked.get(name, part)) for name, part in (rows | {SWITCHES: switches}).items()}


@torch.no_grad()
def measure(predict: Predictor, rows: dict[str, tuple[Rows, Rows]], desc: str) -> Measured:
    found = Measured({}, {}, {}, {})
    for name, (scored, answered) in tqdm(rows.items(), desc=desc, leave=False):
        found.nats[name], found.tokens[name], found.right[name], found.asked[name] = per_row(predict, scored)
        if name in toy.TASKS:
            _, _, right, asked = per_row(predict, answered)
            found.right[name], found.asked[name] = (right == asked).astype(float), np.ones(len(right))
    return found


def per_row(predict: Predictor, rows: Rows, batch: int = 64) -> tuple[np.ndarray, ...]:
    """Sums over each row: of the loss, of scored tokens, of those that are right, of scored tokens again."""
    nats, right, counts = [], [], []
    for places in torch.arange(len(rows)).split(batch):
        part = rows[places]
        log_p, targets = predict(part.tokens, part.prompt)[:, :-1].float().log_softmax(-1), part.labels[:, 1:]
        scored = targets != -100
        chosen = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        nats.append(-(chosen * scored).sum(1))
        right.append(((log_p.argmax(-1) == targets) & scored).sum(1))
        counts.append(scored.sum(1))
    sums = (torch.cat(parts).double().numpy() for parts in (nats, counts, right, counts))
    return tuple(sums)


class LogitGates(nn.Module):
    """Gates alone, over the same state, that mix logits and not distributions: p ~ prod over models of p_m ** g_m."""

    def __init__(self, models: list[LlamaForCausalLM]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models).requires_grad_(False)
        self.gate = nn.Linear(models[0].config.hidden_size, len(models))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs) -> CausalLMOutput:
        with torch.no_grad():
            hub = self.models[0](input_ids=input_ids, output_hidden_states=True)
            logits = [hub.logits, *(model(input_ids=input_ids).logits for model in self.models[1:])]
        gates = self.gate(hub.hidden_states[-1]).softmax(-1)  # of the state behind the final norm
        mixed = sum(gate.unsqueeze(-1) * each for gate, each in zip(gates.unbind(-1), logits))
        loss = None if labels is None else ForCausalLMLoss(mixed, labels, mixed.shape[-1], **kwargs)
        return CausalLMOutput(loss=loss, logits=mixed)


def make(models: toy.Toy, form: str) -> nn.Module:
    """A form before its training."""
    options = FORMS[form]
    if options == {"gates": "logits"}:
        folders = [models.folder(name) for name in ("seed", *toy.EXPERTS)]
        return LogitGates([AutoModelForCausalLM.from_pretrained(folder) for folder in folders])
    config = StitchConfig(task_type="CAUSAL_LM", experts=models.experts, **options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(models.folder("seed")), config)


def of_one_run(
    models: toy.Toy, form: str, steps: int, rate: float, splits: dict[str, dict], runs: Path
) -> dict[str, Measured]:
    """What a form says of each split's rows after training: from the cache, or trained and measured now."""
    options = "-".join(f"{name}={value}" for name, value in FORMS[form].items())
    paths = {split: runs / f"{options or 'paper'}-{steps}-{rate:g}-{split}.npz" for split in splits}
    if not all(path.exists() for path in paths.values()):
        set_seed(0)
        stage = replace(toy.STAGES["stitch"], steps=steps, learning_rate=rate)
        model = toy.train(make(models, form), models.rows(stage), stage, f"{steps} steps, {rate:g}")
        for split, rows in splits.items():
            keep(measure(predictor(model), rows, split), paths[split])
    return {split: read(path) for split, path in paths.items()}


def baselines(models: toy.Toy) -> dict[str, Predictor]:
    plain = {name: AutoModelForCausalLM.from_pretrained(models.folder(name)) for name in ("seed", *toy.EXPERTS)}
    return {
        "seed": predictor(plain["seed"]),
        "average of the weights": predictor(toy.average_weights([*plain.values()])),
        "BTM": BTM([*plain.values()]),
    }


def keep(found: Measured, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.savez_compressed(
        unfinished, **{f"{kind}/{d}": array for kind, by in asdict(found).items() for d, array in by.items()}
    )
    unfinished.replace(path)


def read(path: Path) -> Measured:
    found = Measured({}, {}, {}, {})
    with np.load(path) as file:
        for key in file.files:
            kind, domain = key.split("/")
            getattr(found, kind)[domain] = file[key]
    return found


def figures(found: Measured, base: Measured | None = None) -> dict:
    """What goes to the results file; with `base`, the differences to it as well, with their intervals."""

    def by(kind: dict[str, np.ndarray], names: list[str], scale: float = 1.0) -> dict[str, np.ndarray]:
        return {name: scale * kind[name][None] for name in names}

    def part(kind: str, sizes: str, names: list[str], scale: float = 1.0) -> dict:
        ours, of = by(getattr(found, kind), names, scale), {name: getattr(found, sizes)[name] for name in names}
        result = {"value": interval(ours, of).value}
        if base is not None:
            result["difference"] = asdict(paired(ours, by(getattr(base, kind), names, scale), of))
        return result

    domains = [*toy.DOMAINS]
    return {
        "average": part("right", "asked", domains, 100),
        "loss": part("nats", "tokens", domains),
        "switches": part("nats", "tokens", [SWITCHES], 1 / math.log(2)),
    }


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    models, path = toy.Toy(arguments.cache_dir, smoke=arguments.smoke), Path(arguments.results)
    splits = {split: rows_of(models, split) for split in ("validation", "test")}
    experts = "-".join(models.folder(name).name.rpartition("-")[2] for name in ("seed", *toy.EXPERTS))
    runs = models.cache_dir / "mixture" / experts
    results = {**environment(), "arguments": asdict(arguments), "baselines": {}, "forms": {}}
    del results["arguments"]["cache_dir"], results["arguments"]["results"]

    jobs = [(form, steps) for steps in arguments.steps for form in FORMS]
    paper: dict[int, Measured] = {}
    rate: dict[str, float] = {}
    for form, steps in tqdm(jobs, desc="forms"):
        if form not in rate:  # the shortest run decides
            tried = {r: of_one_run(models, form, steps, r, splits, runs)["validation"].loss() for r in arguments.rates}
            rate[form] = min(tried, key=lambda r: tried[r])
            results["forms"][form] = {"rate": rate[form], "validation_losses": tried}
            weights = make(models, form).parameters()
            results["forms"][form]["trained_parameters"] = sum(p.numel() for p in weights if p.requires_grad)
        found = of_one_run(models, form, steps, rate[form], splits, runs)["test"]
        results["forms"][form][str(steps)] = figures(found, paper.get(steps))
        paper.setdefault(steps, found)  # it comes first
        write_results(results, path)
    for name, predict in tqdm(baselines(models).items(), desc="baselines"):
        results["baselines"][name] = figures(measure(predict, splits["test"], name), paper[arguments.steps[-1]])
        write_results(results, path)
    page = write_page(results, path.with_suffix(".md"))
    show(page, width=160)
    print(f"Wrote {path} and {path.with_suffix('.md')}")


def write_page(results: dict, path: Path) -> str:
    lines = []

    def cell(figure: dict, digits: int) -> str:
        text = f"{figure['value']:.{digits}f}"
        if "difference" in figure:
            d = figure["difference"]
            text += f" ({d['value']:+.{digits}f}: {d['low']:+.{digits}f} to {d['high']:+.{digits}f})"
        return text

    def line(name: str, trained: int, steps: str, row: dict) -> list[str]:
        shown = (("average", 1), ("loss", 3), ("switches", 3))
        return [name, f"{trained:,}", steps, *(cell(row[kind], digits) for kind, digits in shown)]

    for name, row in results["baselines"].items():
        lines.append(line(name, 0, "", row))
    for name, runs in results["forms"].items():
        for steps in results["arguments"]["steps"]:
            lines.append(line(name, runs["trained_parameters"], str(steps), runs[str(steps)]))
    head = ["form", "trained weights", "steps", "average score, %", "loss, nats", "switches, bits"]
    page = (
        "# Output gates against the paper's form\n\n"
        "Written by `python -m benchmarks.mixture`; do not edit. The quickstart's models, one set; test data. "
        "*Average score* is the mean over four domains of next tokens that are right (docstrings, code) or of whole "
        "answers (arithmetic, translation; asked one at a time, without examples). *Loss* is per token, averaged over "
        "the domains; *switches* are sequences whose domain changes in the middle. In brackets, the difference to the "
        "paper's form at the same number of steps (baselines: at the largest), with its 95% interval over rows of the "
        "test data. Learning rates were chosen by the shortest run's loss on validation data, from "
        f"{', '.join(f'{rate:g}' for rate in results['arguments']['rates'])}.\n\n" + table(head, lines) + "\n"
    )
    path.write_text(page)
    return page


if __name__ == "__main__":
    main()
