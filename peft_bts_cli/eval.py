"""`peft-bts eval`: what the stitches gain, measured on the hub, the experts and the stitched model alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Adapter,
    BatchSize,
    Device,
    Dtype,
    MaxTokens,
    Result,
    SequenceLength,
    TextColumn,
    by_name,
)


if TYPE_CHECKING:
    from torch import Tensor, nn
    from tqdm import tqdm


def eval(
    adapter: Adapter,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="A domain and its text or jsonl file (rows of text, or of `messages`). Repeat it for every domain.",
        ),
    ],
    text_column: TextColumn = "text",
    max_tokens: MaxTokens = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
) -> Result:
    """Measure loss per token and perplexity of the hub, of every expert, and of the stitched model, by domain."""
    from tqdm import tqdm

    from peft_bts.model import stitch_tuner

    from .texts import load_domains, read_documents

    files = by_name(data, "--data", "FILE")
    documents = {name: read_documents(file, text_column) for name, file in files.items()}
    model, _, length, domains = load_domains(adapter, documents, dtype, device, sequence_length, max_tokens)
    for name, domain in domains.items():
        domain.keep_predictable()
        if not domain.rows:
            raise ValueError(f"{files[name]} has no two tokens in a row, so there is nothing to predict.")
    attached = stitch_tuner(model).experts[model.active_adapter]
    experts = {name: expert.model for name, expert in sorted(attached.items())}
    total = (2 + len(experts)) * sum(len(domain.rows) for domain in domains.values())
    with tqdm(total=total, desc="eval", unit=" rows") as bar:

        def measure(one: nn.Module, context: Callable[[], Any] = nullcontext) -> dict[str, dict[str, float]]:
            means = {}
            with context():
                for name, domain in domains.items():
                    mean = loss(one, domain.batches(batch_size, model.device), bar)
                    means[name] = {"loss": mean, "perplexity": math.exp(mean)}
            return means

        found = {
            "hub": measure(model, model.disable_adapter),
            "experts": {name: measure(expert) for name, expert in experts.items()},
            "stitched": measure(model),
        }
    sizes = {
        name: {
            "file": files[name],
            "documents": domain.documents,
            "bytes": domain.size,
            "rows": len(domain.rows),
            "predicted_tokens": domain.predicted,
        }
        for name, domain in domains.items()
    }
    result = {"adapter": adapter, "sequence_length": length, "data": sizes, **found}
    return Result(_tables(result), result)


def loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], bar: tqdm) -> float:
    """Compute the mean negative log-likelihood, in nats, of all labels (not -100) but the first of every row."""
    import torch
    from torch import nn

    total, count = 0.0, 0
    for ids, mask, labels in batches:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, row_logits in zip(labels, logits):  # by row: float32 logits are large
            places = (row[1:] != -100).nonzero()[:, 0]
            predicted = row_logits[places].float()
            total += nn.functional.cross_entropy(predicted, row[1:][places], reduction="sum").item()
            count += len(places)
        bar.update(len(ids))
    return total / count


def _tables(result: dict[str, Any]) -> list[Any]:
    from peft_bts.formatting import table

    domains = result["data"]
    experts = {f"{name} expert": row for name, row in result["experts"].items()}
    rows = [
        (who, *(f"{row[name][key]:.4g}" for name in domains for key in ("loss", "perplexity")))
        for who, row in {"hub": result["hub"], **experts, "stitched": result["stitched"]}.items()
    ]
    sizes = [
        (name, data["file"], data["documents"], data["bytes"], data["rows"], data["predicted_tokens"])
        for name, data in domains.items()
    ]
    columns = [f"{name} {key}" for name in domains for key in ("loss", "ppl")]
    return [
        table("Loss per token and perplexity", ["model", *columns], rows),
        table("Data", ["domain", "file", "documents", "bytes", "rows", "predicted tokens"], sizes, left=2),
        "loss: in nats, mean over all tokens but the first of every row; of chats, over what the assistant says.\n"
        "ppl: exp(loss). hub, experts: each alone. "
        f"Documents are cut into rows of {result['sequence_length']} tokens. No row sees another.",
    ]
