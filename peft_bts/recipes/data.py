"""Documents of domains: where they come from, what is held out of them, and how they become rows of tokens.

The training scripts in `examples/` use these functions, too. `datasets` is needed only when documents are read.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.peft import base_model
from ..forward.decoder import text_config
from ..install import how_to_install
from ..model import stitch_tuner


if TYPE_CHECKING:
    from datasets import Dataset


READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # all other files are text
_COMPRESSED = (".gz", ".zst")
_FILES = {*READERS, ".txt", ".md", ".py", *_COMPRESSED}  # what has such an ending is no id on the Hub


@dataclass(frozen=True)
class Domain:
    """The training data of a domain.

    Attributes:
        source: A file, a pattern of files, a folder, or an id on the Hub, `org/name` or `org/name/subset`.
        weight: Its share of the training mix, relative to the others'; 0 if it is only evaluated.
    """

    source: str
    weight: float = 1.0


def as_domain(name: str, value: str) -> Domain:
    """Read `source`, `source:weight`, or JSON with the keys `source` and `weight`.

    Raises:
        ValueError: If it is none of these.
    """
    if value.startswith("{"):
        try:
            domain = Domain(**json.loads(value))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Domain {name!r} takes the keys source and weight, got {value}.") from error
    else:
        match = re.fullmatch(r"(.+?)(?::(\d+\.?\d*|\.\d+))?", value)
        if match is None:
            raise ValueError(f"Domain {name!r} names no source.")
        domain = Domain(match[1], float(match[2] or 1))
    if not isinstance(domain.source, str) or not isinstance(domain.weight, (int, float)) or not domain.weight >= 0:
        raise ValueError(f"Domain {name!r} needs a source and a weight of at least 0, got {value}.")
    return domain


def suffix(file: str) -> str:
    """A file's ending that tells its kind: that before `.gz` or `.zst`."""
    whole, last = os.path.splitext(file)
    return os.path.splitext(whole)[1] if last in _COMPRESSED else last


def load_documents(source: str) -> Dataset:
    """The documents of a file, a pattern of files, a folder, or an id on the Hub (its split "train").

    A text file is one document, a row of jsonl, csv or parquet is one, too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If files are of several kinds, or hold no documents.
    """
    datasets = _datasets()
    pattern = os.path.join(source, "**") if os.path.isdir(source) else source
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if files:
        readers = {READERS.get(suffix(file), "text") for file in files}
        if len(readers) > 1:
            raise ValueError(f"{source!r} has files of several kinds, {sorted(readers)}: make each a domain.")
        if all(map(_is_blank, files)):  # which `datasets` knows no good error for
            raise ValueError(f"{source!r} holds no documents.")
        (reader,) = readers
        options = {"sample_by": "document"} if reader == "text" else {}
        try:
            return datasets.load_dataset(reader, data_files=files, split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
            raise ValueError(f"{source!r} cannot be read as {reader}: {error.__cause__ or error}") from error
    parts = source.split("/")
    repository, subset = "/".join(parts[:2]), "/".join(parts[2:]) or None
    ours = source.startswith((".", "/", "~")) or os.path.splitext(source)[1] in _FILES or os.path.exists(parts[0])
    if ours or glob.has_magic(source):
        raise FileNotFoundError(f"There is no file {source!r}.")
    try:
        return datasets.load_dataset(repository, subset, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no file {source!r}, and no such data could be loaded from the Hub: {error}"
        ) from error


def split_domains(
    domains: Mapping[str, Domain], evaluation: Mapping[str, str], held_out: int, seed: int = 0
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The documents to train on and those to evaluate on, by domain.

    Documents are shuffled first, since files may be sorted, and what is held out should be fair. The same source and
    seed hold out the same documents, in every run and in every script.

    Args:
        domains: Where documents come from. Those of weight 0 are only evaluated.
        evaluation: Where documents for evaluation come from. All other domains hold out some of their own.
        held_out: How many.

    Raises:
        OSError, ValueError: If documents cannot be read, or none would be left to train on.
    """
    training, evaluated = {}, {}
    for name, source in evaluation.items():
        evaluated[name] = load_documents(source)
    for name, domain in domains.items():
        if domain.weight == 0 and name in evaluation:
            continue
        documents = load_documents(domain.source).shuffle(seed=seed)
        border = len(documents) - (0 if name in evaluation else held_out)
        if border < (1 if domain.weight else 0):
            raise ValueError(
                f"Domain {name!r} has {len(documents)} document(s), so none is left to train on when {held_out} are "
                "held out. Set held_out to fewer, or name a file of its own as evaluation data, where that can be "
                "done. A text file is one document: split it."
            )
        if border < len(documents):
            evaluated[name] = documents.select(range(border, len(documents)))
        if domain.weight > 0:
            training[name] = documents.select(range(border))
    return training, evaluated


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str = "text"
) -> Dataset:
    """The documents one after another, with an end token between them, cut into rows of `block_size` tokens.

    Raises:
        ValueError: If there is no such column, no end token, or not a single row.
    """
    end = tokenizer.eos_token_id
    if text_column not in documents.column_names:
        raise ValueError(f"The data has no column {text_column!r} but {documents.column_names}: see text_column.")
    if end is None:
        raise ValueError("The tokenizer has no end token (`eos_token`) to put behind documents.")

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens: list[int] = []
        for ids in tokenizer(batch[text_column], verbose=False)["input_ids"]:
            separated = end in (*ids[:1], *ids[-1:])  # some tokenizers open documents with it
            tokens += ids if separated else [*ids, end]
        starts = range(0, len(tokens) - block_size + 1, block_size)  # an incomplete last row is dropped
        rows = [tokens[start : start + block_size] for start in starts]
        return {"input_ids": rows, "labels": rows}

    return documents.map(cut, batched=True, remove_columns=documents.column_names, desc="Packing")


def mix(rows: Mapping[str, Dataset], weights: Mapping[str, float], seed: int = 0) -> Dataset:
    """Rows of all domains in the shares that their weights give them.

    One epoch goes through every domain at least once; the rows of small domains are repeated.

    Raises:
        ValueError: If there is nothing to train on.
    """
    empty = [name for name, found in rows.items() if len(found) == 0]
    if empty or not rows:
        raise ValueError(
            f"Domain {empty[0]!r} has not one whole row of tokens to train on; see block_size."
            if empty
            else "No domain has a weight above 0, so there is nothing to train on."
        )
    shares = [weights[name] / sum(weights[other] for other in rows) for name in rows]
    return _datasets().interleave_datasets(list(rows.values()), shares, seed=seed, stopping_strategy="all_exhausted")


def check_block_size(block_size: int, model: Union[PreTrainedModel, PeftModel]) -> None:
    """Check that rows are not longer than a model, or the hub and its experts, have positions.

    Raises:
        ValueError: If they are; names the model.
    """
    models: dict[str, Any] = {"the model": model}
    if isinstance(model, PeftModel):
        models = {"the hub": base_model(model)}
        for name, expert in stitch_tuner(model).experts[model.active_adapter].items():
            models[f"expert {name!r}"] = expert.model
    for who, one in models.items():
        positions = getattr(text_config(one), "max_position_embeddings", None)
        if positions is not None and block_size > positions:
            raise ValueError(f"block_size {block_size} is more than the {positions} positions of {who}.")


def _is_blank(file: str) -> bool:
    """Return whether there is nothing in a file but white space."""
    with open(file, "rb") as lines:
        return not any(line.strip() for line in lines)


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Training needs datasets: {how_to_install('train')}.", name="datasets") from error
    return datasets
