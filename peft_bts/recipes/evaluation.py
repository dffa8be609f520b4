"""The evaluation data of a recipe, as files that `assess`, `eval` and `gates` read."""

from __future__ import annotations

import os
from pathlib import Path

from .data import READERS, split_domains, suffix
from .recipe import Recipe


def evaluation_files(recipe: Recipe) -> dict[str, str]:
    """Files of evaluation documents by domain.

    Text and jsonl files that the recipe names are used as they are. All else, held-out documents among it, is written
    to `evaluation/NAME.jsonl` in the recipe's output folder; it is the same data by which `train` evaluates.

    Raises:
        OSError, ValueError: If data cannot be read.
    """
    as_they_are = {name: source for name, source in recipe.evaluation.items() if _is_plain(source)}
    if not {*recipe.domains, *recipe.evaluation} - {*as_they_are}:
        return as_they_are
    recipe.require("output_dir")
    others = {name: source for name, source in recipe.evaluation.items() if name not in as_they_are}
    domains = {name: domain for name, domain in recipe.domains.items() if name not in as_they_are}
    _, evaluated = split_domains(domains, others, recipe.data.held_out)
    folder = Path(recipe.output_dir, "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(as_they_are)
    for name, documents in evaluated.items():
        column = recipe.data.text_column
        if column not in documents.column_names:
            raise ValueError(
                f"Domain {name!r} has no column {column!r} but {documents.column_names}: see text_column."
            )
        files[name] = str(folder / f"{name}.jsonl")
        documents.select_columns([column]).to_json(files[name])
    return files


def _is_plain(source: str) -> bool:
    ending = os.path.splitext(source)[1]
    return os.path.isfile(source) and (ending == ".jsonl" or suffix(source) not in READERS)
