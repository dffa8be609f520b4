"""What an earlier run of the study found, from its results file alone: its pieces are on another machine, or gone.

A run that goes on from there takes the learning rates that the earlier one chose, instead of trying them again; and
the report has of every figure the one that is over more sets (`reporting/merging.py`). Its own sets have the same
numbers, data and seeds as the earlier run's, but on another processor they become other models: differences are
always taken within one run.
"""

import json
from pathlib import Path
from typing import Any

from ..methods.registry import form_of, is_ours
from .jobs import Store
from .presets import Part


FILE = "earlier.json"


def keep_earlier(path: Path, preset: str, store: Store) -> None:
    """Let a store go on from a results file, which is copied there: later calls need not name it.

    Raises:
        ValueError: If there is no such file, or it is of another preset; or if the store goes on from another one, or
            has results without one: learning rates would come from two sources.
    """
    if not path.is_file():
        raise ValueError(f"there is no results file {path}")
    results = json.loads(path.read_text())
    if results["preset"] != preset:
        raise ValueError(f"{path} is of the preset {results['preset']}, not {preset}")
    kept = store.folder / FILE
    if kept.exists():
        if json.loads(kept.read_text()) != results:
            raise ValueError(f"this cache goes on from another file already, which is kept as {kept}")
        return
    if store.has("tests"):
        raise ValueError(f"{store.folder} has results already: take another --cache_dir to go on from {path}")
    store.folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(results))


def read_earlier(store: Store) -> dict[str, Any]:
    """The results that a store goes on from; empty where there are none."""
    path = store.folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def rate_of(earlier: dict[str, Any], part: Part, method: str) -> float | None:
    """The learning rate that an earlier run chose for a method: in the same table; else with the main models, or with
    the most items of the cross task; else, of ours, the one of the form that it is a variant of. `None`: nothing is
    known of it."""
    if not earlier:
        return None
    if part.kind == "cross":
        tables = [earlier["cross"].get(part.title, {}), earlier["cross"].get("2000", {})]
    else:
        of_part = earlier["lora"] if part.lora else earlier["sizes"].get(part.size, {})
        tables = [of_part, earlier["methods"]]
    for name in (method, *([form_of(method)] if is_ours(method) else [])):
        for table in tables:
            if rates := table.get(name, {}).get("learning_rates"):
                return rates[0]
    return None
