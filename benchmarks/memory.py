"""Memory of a training step: stitches, a LoRA on the hub alone, and full training of the same models.

    python benchmarks/memory.py

Every row is measured in a process of its own, with random llama models; all are written to
`benchmarks/results/memory.json`:

- peak: how far the process's resident memory (`ru_maxrss`) rises above what it holds once the models are loaded,
  over two steps: activations, gradients, the optimizer's state, and what the allocator adds;
- graph: bytes of the tensors that the forward pass keeps for the backward pass, weights not counted; free of
  noise, and about the same on a GPU. It is the part that gradient checkpointing is there to reduce.
"""

import json
import platform
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import psutil
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_bts import StitchConfig


CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
WHAT = {
    "stitches, alternating": {"pattern": "alternating"},
    "stitches, experts_into_hub": {"pattern": "experts_into_hub"},
    "LoRA on the hub alone (r=8)": None,
    "full training, hub and experts": None,
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
    measure: str = field(default="", metadata={"help": "for this script's own use: the row to measure"})
    checkpointing: str = field(default="none", metadata={"help": "for this script's own use"})


def llama(arguments):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,  # small, so that the logits do not hide what the layers take
            hidden_size=arguments.width,
            intermediate_size=4 * arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.width // 64,
            num_key_value_heads=arguments.width // 64,
            max_position_embeddings=arguments.length,
        )
    )


def make_models(what, arguments):
    """The models to train, each with the loss of its own."""
    hub = llama(arguments)
    if what.startswith("stitches"):
        model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", **WHAT[what]))
        for i in range(arguments.experts):
            model.attach_expert(f"e{i}", llama(arguments))
        return [model]
    if what.startswith("LoRA"):
        return [get_peft_model(hub, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))]
    return [hub, *(llama(arguments) for _ in range(arguments.experts))]


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step(models, optimizer, tokens):
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


def measure(arguments):
    torch.manual_seed(0)
    models = make_models(arguments.measure, arguments)
    for model in models:
        model.train()
        if CHECKPOINTING[arguments.checkpointing] is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[arguments.checkpointing])
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(1024, (arguments.batch, arguments.length))
    before = psutil.Process().memory_info().rss
    graph = step(models, optimizer, tokens)
    step(models, optimizer, tokens)  # with the optimizer's state in memory, which the first step has made
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "model_bytes": sum(p.numel() * p.element_size() for model in models for p in model.parameters()),
        "peak_bytes": peak_bytes() - before,
        "graph_bytes": graph,
    }


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return

    settings = {k: v for k, v in asdict(arguments).items() if k not in ("results", "measure", "checkpointing")}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    machine = {"machine": platform.processor() or platform.machine(), "versions": versions}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    combinations = [(what, checkpointing) for what in WHAT for checkpointing in CHECKPOINTING]
    for what, checkpointing in tqdm(combinations, desc="measure"):
        command = [sys.executable, __file__, *options, "--measure", what, "--checkpointing", checkpointing]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        rows.append({"what": what, "checkpointing": checkpointing, **result})
        path.write_text(json.dumps({**machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print_table(rows, settings)
    print(f"Wrote {path}")


def print_table(rows, settings):
    table = Table(title="Memory of a training step, in MiB")
    for heading in ("trained", "checkpoints", "weights trained", "peak", "ratio", "graph", "ratio"):
        table.add_column(heading, justify="left" if heading in ("trained", "checkpoints") else "right")
    first = rows[0]
    for row in rows:
        table.add_row(
            row["what"],
            row["checkpointing"],
            f"{row['trained_parameters'] / 1e6:.1f}M",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
            f"{row['graph_bytes'] / 2**20:,.0f}",
            f"{row['graph_bytes'] / first['graph_bytes']:.2f}",
            end_section=row["checkpointing"] == list(CHECKPOINTING)[-1],
        )
    Console(width=119).print(table)
    print(", ".join(f"{name} {value}" for name, value in settings.items()))


if __name__ == "__main__":
    main()
