"""Memory of a training step: stitches, a LoRA on the hub alone, and full training of the same models.

    python -m benchmarks.memory

Every row is measured in a process of its own, with random llama models; all are written to
`benchmarks/results/memory.json`:

- peak: how far the process's resident memory rises above what it holds once the models are loaded, over two steps:
  activations, gradients, the optimizer's state, and what the allocator adds;
- graph: bytes of the tensors that the forward pass keeps for the backward pass, weights not counted; free of
  noise, and about the same on a GPU. It is the part that gradient checkpointing is there to reduce.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from transformers import HfArgumentParser

from .measuring import Peak, in_fresh_process, set_up
from .random_models import Case, bytes_of, to_train, token_ids
from .reporting import environment, show, table, write_results


CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
WHAT = {
    "stitches, alternating": "alternating",
    "stitches, experts_into_hub": "experts_into_hub",
    "LoRA on the hub alone (r=8)": "LoRA",
    "full training, hub and experts": "full",
}


@dataclass
class Arguments:
    width: int = field(default=512, metadata={"help": "hidden size of every model"})
    layers: int = field(default=8, metadata={"help": "decoder layers of every model"})
    experts: int = 3
    batch: int = 2
    length: int = field(default=256, metadata={"help": "tokens of a sequence"})
    threads: int = 1
    results: str = field(default="benchmarks/results/memory.json", metadata={"help": "file to write"})


def case_of(arguments: Arguments) -> Case:
    width, heads = arguments.width, arguments.width // 64
    vocabulary = 1024  # small, so that the logits do not hide what the layers take
    return Case(width, arguments.layers, heads, heads, 4 * width, vocabulary, experts=arguments.experts)


def step(models: list[torch.nn.Module], optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> int:
    """One step; returns the largest `graph` of a model, see above: every storage once, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    graphs = []
    for model in models:
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=tokens, labels=tokens).loss
        graphs.append(sum(kept.values()))
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return max(graphs)


def measure(case: Case, kind: str, checkpointing: dict | None, batch: int, length: int) -> dict:
    models = to_train(case, kind)
    for model in models:
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = token_ids(case, batch, length)
    peak = Peak(case.device)
    graph = step(models, optimizer, tokens)
    step(models, optimizer, tokens)  # with the optimizer's state in memory, which the first step has made
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "model_bytes": sum(map(bytes_of, models)),
        "peak_bytes": peak.rise(),
        "graph_bytes": graph,
    }


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    case, sizes = case_of(arguments), (arguments.batch, arguments.length)
    settings = {name: value for name, value in asdict(arguments).items() if name != "results"}
    path, rows = Path(arguments.results), []
    for what, checkpointing in tqdm([(what, how) for what in WHAT for how in CHECKPOINTING], desc="measure"):
        measured = in_fresh_process(measure, case, WHAT[what], CHECKPOINTING[checkpointing], *sizes)
        rows.append({"what": what, "checkpointing": checkpointing, **measured})
        write_results({**environment(), "settings": settings, "rows": rows}, path)

    lines = []
    for row in rows:
        line = [row["what"], row["checkpointing"], f"{row['trained_parameters'] / 1e6:.1f}M"]
        for key in ("peak_bytes", "graph_bytes"):
            line += [f"{row[key] / 2**20:,.0f}", f"{row[key] / rows[0][key]:.2f}"]
        lines.append(line)
    titles = ["trained", "checkpoints", "weights trained", "peak, MiB", "ratio", "graph, MiB", "ratio"]
    show(table(titles, lines, left=2), width=119)
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
