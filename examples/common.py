"""What the training scripts share: experts and datasets on the command line, and a mixture of packed blocks.

    --expert code=org/seed-code math=org/seed-math@v2
    --dataset code='src/*.py':15 math=math.jsonl:15 general=org/corpus/subset:70

`--dataset` is `name=source:weight`. The weight is the domain's share of the training mix, relative to the others', and
1 if left out; a domain of weight 0 is only evaluated. A source is a file, a pattern of files, a folder, or an id on
the Hub, `org/name` or `org/name/subset`. A text file is one document, a row of jsonl, csv or parquet is one, too.
"""

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, interleave_datasets, load_dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # all other files are text
FILES = {*READERS, ".txt", ".md", ".py", ".gz", ".zst"}  # what ends so is no dataset on the Hub


@dataclass
class DataArguments:
    dataset: list[str] = field(metadata={"action": "extend", "help": "name=source[:weight], for each domain"})
    held_out: int = field(default=50, metadata={"help": "rows of each domain that are kept for evaluation"})


@dataclass
class PackingArguments:
    block_size: int = field(default=1024, metadata={"help": "tokens in a row of the training data"})
    text_column: str = field(default="text", metadata={"help": "where documents have their text"})


def parse_experts(values: list[str]) -> dict[str, dict[str, Any]]:
    """`name=id_or_path[@revision]`, several times, as the `experts` of a `StitchConfig`."""
    experts = {}
    for value in values:
        name, _, source = value.partition("=")
        if not source:
            raise ValueError(f"--expert {value!r} is not of the form name=id_or_path[@revision].")
        if name in experts:
            raise ValueError(f"--expert gives the name {name!r} twice.")
        experts[name] = {"model": source}
        if "@" in source and not os.path.exists(source):
            experts[name]["model"], experts[name]["revision"] = source.rsplit("@", 1)
    return experts


def parse_datasets(values: list[str]) -> dict[str, tuple[str, float]]:
    """`name=source[:weight]`, several times, as {name: (source, weight)}."""
    domains = {}
    for value in values:
        match = re.fullmatch(r"(\w+)=(.+?)(?::(\d+\.?\d*|\.\d+))?", value)
        if match is None:
            raise ValueError(f"--dataset {value!r} is not of the form name=source[:weight].")
        name, source, weight = match.groups(default="1")
        if name in domains:
            raise ValueError(f"--dataset gives the name {name!r} twice; use a pattern or a folder for several files.")
        domains[name] = source, float(weight)
    return domains


def load_documents(source: str) -> Dataset:
    """The documents of a file, a pattern of files, a folder, or an id on the Hub (its split "train")."""
    pattern = os.path.join(source, "**") if os.path.isdir(source) else source
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if files:
        if all(map(is_blank, files)):  # which `datasets` knows no good error for
            raise ValueError(f"--dataset: there is nothing in {source!r}.")
        readers = {READERS.get(os.path.splitext(file)[1], "text") for file in files}
        if len(readers) > 1:
            raise ValueError(f"{source!r} has files of several kinds, {sorted(readers)}: make each a domain.")
        (reader,) = readers
        options = {"sample_by": "document"} if reader == "text" else {}
        return load_dataset(reader, data_files=files, split="train", **options)
    parts = source.split("/")
    repository, subset = "/".join(parts[:2]), "/".join(parts[2:]) or None
    is_path = os.path.exists(repository) or glob.has_magic(source) or os.path.splitext(source)[1] in FILES
    if is_path or parts[0] in ("", ".", "..", "~"):
        raise FileNotFoundError(f"--dataset: there is no file {source!r}.")
    try:
        return load_dataset(repository, subset, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset: there is no file {source!r}, and no such dataset could be loaded from the Hub: {error}"
        ) from error


def is_blank(file: str) -> bool:
    """Whether there is nothing in a file but white space."""
    with open(file, "rb") as lines:
        return not any(line.strip() for line in lines)


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: PackingArguments) -> Dataset:
    """The documents, an end token behind each, one after another, cut into rows of `block_size` tokens."""
    size, column, end = arguments.block_size, arguments.text_column, tokenizer.eos_token_id
    if column not in documents.column_names:
        raise ValueError(f"The data has no column {column!r} but {documents.column_names}: see --text_column.")
    if end is None:
        raise ValueError("The tokenizer has no end token (`eos_token`) to put behind documents.")

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = []
        for ids in tokenizer(batch[column], verbose=False)["input_ids"]:
            tokens += ids if ids[-1:] == [end] else [*ids, end]
        starts = range(0, len(tokens) - size + 1, size)  # an incomplete last row is dropped
        rows = [tokens[start : start + size] for start in starts]
        return {"input_ids": rows, "labels": rows}

    return documents.map(cut, batched=True, remove_columns=documents.column_names, desc="Packing")


def check_block_size(size: int, model: PreTrainedModel | PeftModel) -> None:
    """Raise `ValueError` if rows are longer than a model has positions: the model, or the hub and its experts."""
    models = {"the model": model}
    if isinstance(model, PeftModel):
        experts = model.base_model.experts[model.active_adapter]
        models = {"the hub": model.get_base_model(), **{f"expert {name!r}": experts[name].model for name in experts}}
    for who, one in models.items():
        positions = getattr(one.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and size > positions:
            raise ValueError(f"--block_size {size} is more than the {positions} positions of {who}.")


def load_domains(
    arguments: DataArguments, prepare: Callable[[Dataset], Dataset] = lambda documents: documents, seed: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training mix in the given shares, and the held-out rows of each domain.

    `prepare` makes rows of a domain's documents, such as `pack`. One epoch of the mix goes through every domain at
    least once; the rows of small domains are repeated.
    """
    train, weights, held_out = [], [], {}
    for name, (source, weight) in parse_datasets(arguments.dataset).items():
        rows = prepare(load_documents(source).shuffle(seed=seed))  # files may be sorted, and what is held out is fair
        border = len(rows) - arguments.held_out
        if border < 1:
            raise ValueError(
                f"Domain {name!r} has {len(rows)} rows, so none is left to train on when {arguments.held_out} are "
                "held out: see --held_out, and --block_size where there is one."
            )
        held_out[name] = rows.select(range(border, len(rows)))
        if weight > 0:
            train.append(rows.select(range(border)))
            weights.append(weight)
    if not train:
        raise ValueError("--dataset gives no domain a weight above 0, so there is nothing to train on.")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(train, shares, seed=seed, stopping_strategy="all_exhausted"), held_out
