"""`peft-bts gates`: which models the stitches listen to in given texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

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


def gates(
    adapter: Adapter,
    text: Annotated[Optional[list[str]], typer.Option("--text", help="A text. The option can be repeated.")] = None,
    file: Annotated[
        Optional[list[str]],
        typer.Option(
            "--file",
            metavar="[NAME=]FILE",
            help="A domain and its text or jsonl file. Repeat the option for every domain.",
        ),
    ] = None,
    html: Annotated[
        Optional[Path], typer.Option(help="Write a page with every token in the colour of its dominant model.")
    ] = None,
    png: Annotated[
        Optional[Path], typer.Option(help="Draw the gates of the first row of every domain, token by token.")
    ] = None,
    by: Annotated[
        Literal["domain", "sequence", "stitch"],
        typer.Option(help="What a line of the table is about: a domain, or each of its sequences or stitches."),
    ] = "domain",
    stitch: Annotated[int, typer.Option(help="The stitch to count and draw, from 0. The last is -1.")] = -1,
    text_column: TextColumn = "text",
    max_tokens: MaxTokens = 4096,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
) -> Result:
    """Show mean gates, dominance and entropy over texts, by domain. Can also write a page and a figure."""
    if not text and not file:
        raise typer.BadParameter("give a text or a file.", param_hint="--text / --file")
    import torch
    from tqdm import tqdm

    from peft_bts.gates.extras import needs
    from peft_bts.gates.trace import trace_gates

    from .texts import load_domains, read_documents

    if png is not None:  # this, and folders that are not there, is said before anything is loaded
        needs("matplotlib")
    for path in (html, png):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    named = [one if "=" in one and not Path(one).exists() else f"{Path(one).stem}={one}" for one in file or []]
    files = by_name(named, "--file", "FILE")
    documents = {name: read_documents(path, text_column) for name, path in files.items()}
    if text:
        documents["text"] = [*text, *documents.get("text", [])]
    model, tokenizer, _, domains = load_domains(adapter, documents, dtype, device, sequence_length, max_tokens)
    total = sum(len(domain.rows) for domain in domains.values())
    if total == 0:
        raise ValueError("The texts have no tokens, so there is nothing to see.")
    with tqdm(total=total, desc="gates", unit=" rows") as bar, trace_gates(model) as trace, torch.no_grad():
        for name, domain in domains.items():
            with trace.domain(name):
                for ids, mask, _ in domain.batches(batch_size, model.device):
                    model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
                    bar.update(len(ids))
    if not -len(trace.stitches) <= stitch < len(trace.stitches):
        raise ValueError(f"--stitch {stitch}: the adapter has {len(trace.stitches)} stitches, counted from 0.")
    found = trace.table(by="domain" if by == "domain" else ("domain", by), stitch=stitch)
    if html is not None:
        trace.to_html(html, tokenizer=tokenizer)
    if png is not None:
        trace.plot(stitch=stitch, tokenizer=tokenizer).savefig(png)
    written = [str(path) for path in (html, png) if path is not None]
    sizes = {
        name: {"documents": domain.documents, "bytes": domain.size, "tokens": sum(map(len, domain.rows))}
        for name, domain in domains.items()
    }
    counted = (
        f"{name}: {size['tokens']:,} tokens ({size['bytes']:,} bytes) of {size['documents']:,} documents"
        for name, size in sizes.items()
    )
    parts = [found, "; ".join(counted), *(f"Wrote {path}" for path in written)]
    return Result(parts, {"adapter": adapter, "data": sizes, **found.to_dict(), "written": written})
