"""The input of `eval` and `gates`: an adapter with its tokenizer, and text files as rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.utils import CONFIG_NAME, infer_device
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .._compat.peft import CausalLM, base_model
from .._compat.transformers import find_file
from ..forward.decoder import text_config
from ..model import stitch_tuner
from .common import stitch_config


TextColumn = Annotated[str, typer.Option(help="The field of a jsonl row that holds its text.")]
MaxTokens = Annotated[Optional[int], typer.Option(min=1, help="Read at most this many tokens of each domain.")]
SequenceLength = Annotated[
    Optional[int],
    typer.Option(
        min=2, help="Tokens per row. Longer documents are cut. Default: 1024, or fewer if a model takes fewer."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
Device = Annotated[
    Optional[str], typer.Option(help="Where to run. Default: the accelerator if there is one, or else cpu.")
]


def read_documents(source: str, text_column: str) -> list[str]:
    """Read the documents of a file: a .jsonl file has one per row, any other file is one.

    Raises:
        OSError, ValueError: If the file cannot be read, or holds no text.
    """
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    documents = [content]
    if path.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                documents.append(json.loads(line)[text_column])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{source}, line {number}: expected a JSON object with {text_column!r}.") from error
            if not isinstance(documents[-1], str):
                raise ValueError(f"{source}, line {number}: {text_column!r} is not a string.")
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{source} holds no text.")
    return documents


def load(adapter: str, dtype: str, device: Optional[str]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter with its models, in eval mode, and the tokenizer beside it, or else that of its hub."""
    config = stitch_config(adapter)
    own = find_file(adapter, "tokenizer_config.json")
    if config.base_model_name_or_path is None:
        raise ValueError(f"{adapter!r} does not say what its hub is; set base_model_name_or_path in {CONFIG_NAME}.")
    source, revision = (adapter, None) if own else (config.base_model_name_or_path, config.revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    device = device or infer_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype, device_map=device)
    return model.eval(), tokenizer


def row_length(model: PeftModel, asked: Optional[int]) -> int:
    """Choose the tokens per row: as asked for, or else 1024, or fewer if a model has fewer positions.

    Raises:
        ValueError: If a model cannot take as many as asked for.
    """
    models: dict[str, CausalLM] = {"hub": base_model(model)}
    for name, expert in stitch_tuner(model).experts[model.active_adapter].items():
        models[f"expert {name!r}"] = expert.model
    found = {who: getattr(text_config(one), "max_position_embeddings", None) for who, one in models.items()}
    limits: dict[str, int] = {who: limit for who, limit in found.items() if limit}
    for who, limit in limits.items():
        if asked is not None and asked > limit:
            raise ValueError(f"--sequence-length {asked} is more than the {limit} positions of the {who}.")
    return asked or min([1024, *limits.values()])


def load_domains(
    adapter: str,
    documents: dict[str, list[str]],
    dtype: str,
    device: Optional[str],
    sequence_length: Optional[int],
    max_tokens: Optional[int],
) -> tuple[PeftModel, PreTrainedTokenizerBase, int, dict[str, Domain]]:
    """Load the model and its tokenizer, choose the tokens per row, and cut the documents of every domain into rows."""
    model, tokenizer = load(adapter, dtype, device)
    length = row_length(model, sequence_length)
    domains = {name: Domain.of(texts, tokenizer, length, max_tokens) for name, texts in documents.items()}
    return model, tokenizer, length, domains


@dataclass
class Domain:
    """The text of a domain, as models get it.

    Attributes:
        rows: Token ids. A document is cut into rows, and no row holds parts of two.
        documents, size: How many documents these are, and how many bytes (UTF-8) they have.
    """

    rows: list[list[int]]
    documents: int = 0
    size: int = 0

    @classmethod
    def of(
        cls, documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: Optional[int]
    ) -> Domain:
        """Tokenize documents with the special tokens that the tokenizer adds, until there are `max_tokens` tokens."""
        domain, left = cls([]), float("inf") if max_tokens is None else max_tokens
        for document in documents:
            ids = tokenizer(document, verbose=False)["input_ids"]
            if len(ids) > left:
                ids = ids[: int(left)]
                document = str(tokenizer.decode(ids, skip_special_tokens=True))
            domain.rows += [ids[start : start + length] for start in range(0, len(ids), length)]
            domain.documents += 1
            domain.size += len(document.encode())
            left -= len(ids)
            if left <= 0:
                break
        return domain

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `input_ids` and `attention_mask`, int64 and of shape (at most `size`, T), padded on the right."""
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            ids = torch.zeros_like(mask)
            for i, row in enumerate(rows):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            yield ids.to(device), mask.to(device)
