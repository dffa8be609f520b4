"""What the training scripts share: experts and datasets on the command line, and a mixture of packed blocks.

    --expert code=org/seed-code math=org/seed-math@v2
    --dataset code='src/*.py':15 math=math.jsonl:15 general=org/corpus/subset:70

`--dataset` is `name=source:weight`. The weight is the domain's share of the training mix, relative to the others', and
1 if left out; a domain of weight 0 is only evaluated. A source is a file, a pattern of files, a folder, or an id on
the Hub, `org/name` or `org/name/subset`. A text file is one document, a row of jsonl, csv or parquet is one, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peft_bts.recipes import data as recipe_data
from peft_bts.recipes.data import Domain, as_domain, check_block_size, mix, split_domains
from peft_bts.recipes.recipe import by_name
from peft_bts.reference import as_source


__all__ = ["DataArguments", "PackingArguments", "check_block_size", "load_domains", "pack", "parse_experts"]


@dataclass
class DataArguments:
    dataset: list[str] = field(metadata={"action": "extend", "help": "name=source[:weight], for each domain"})
    held_out: int = field(default=50, metadata={"help": "documents of each domain that are kept for evaluation"})


@dataclass
class PackingArguments:
    block_size: int = field(default=1024, metadata={"help": "tokens in a row of the training data"})
    text_column: str = field(default="text", metadata={"help": "where documents have their text"})


def parse_experts(values: list[str]) -> dict[str, dict[str, Any]]:
    """`name=id_or_path[@revision]`, several times, as the `experts` of a `StitchConfig`."""
    sources = {name: as_source(value) for name, value in by_name("--expert", values).items()}
    return {name: source if isinstance(source, dict) else {"model": source} for name, source in sources.items()}


def parse_datasets(values: list[str]) -> dict[str, Domain]:
    """`name=source[:weight]`, several times."""
    return {name: as_domain(name, value) for name, value in by_name("--dataset", values).items()}


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: PackingArguments) -> Dataset:
    """The documents as rows of `block_size` tokens."""
    return recipe_data.pack(documents, tokenizer, arguments.block_size, arguments.text_column)


def load_domains(
    arguments: DataArguments, prepare: Callable[[Dataset], Dataset] = lambda documents: documents
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training mix in the given shares, and what is held out of each domain.

    `prepare` makes rows of a domain's documents, such as `pack`. One epoch of the mix goes through every domain at
    least once; the rows of small domains are repeated.
    """
    domains = parse_datasets(arguments.dataset)
    training, held_out = split_domains(domains, {}, arguments.held_out)
    rows = {name: prepare(documents) for name, documents in training.items()}
    mixed = mix(rows, {name: domain.weight for name, domain in domains.items()})
    return mixed, {name: prepare(documents) for name, documents in held_out.items()}
