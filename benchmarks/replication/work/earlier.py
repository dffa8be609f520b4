"""What an earlier run of the study found, from its results file alone: its pieces are on another machine, or gone.

A run that goes on from there takes the learning rates that the earlier one chose, instead of trying them again; and
the report has the figures of both (`reporting/merging.py`). Its own sets have the same numbers, data and seeds as the
earlier run's, but may become other models, on another processor: differences are always taken within one run.
"""

import json
from pathlib import Path
from typing import Any

from ..methods.registry import form_of, is_ours
from .jobs import Store
from .presets import FORMS, Part, Preset


FILE = "earlier.json"
NEEDED = ("commit", "sets", "core_minutes", "pieces", "methods", "cross", "lora", "sizes", "gaps", "paired", "claims")


def runs_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs whose figures a results file has, the first one first."""
    return results.get("runs") or [
        {key: results.get(key) for key in ("commit", "machine", "python", "versions", "sets", "core_minutes")}
    ]


def keep_earlier(path: Path, name: str, preset: Preset, store: Store) -> None:
    """Let a store go on from a results file, which is copied there: later calls need not name it, but may, also when
    this run's figures have been added to it.

    Raises:
        ValueError: If there is no such file, or it is of another preset or other settings; or if the store goes on
            from another one, or has results without one: learning rates would come from two sources.
    """
    if not path.is_file():
        raise ValueError(f"there is no results file {path}")
    results = json.loads(path.read_text())
    if results.get("preset") != name:
        raise ValueError(f"{path} is of the preset {results.get('preset')}, not {name}")
    settings = {key: value for key, value in results["settings"].items() if key != "parts"}
    if settings != json.loads(json.dumps(preset.settings)) or any(key not in results for key in NEEDED):
        raise ValueError(f"{path} is of other settings than this preset has now")
    kept = read_earlier(store)
    if kept:
        if runs_of(results)[: len(runs_of(kept))] != runs_of(kept):
            raise ValueError(f"this cache goes on from another file already, which is kept as {store.folder / FILE}")
    elif store.has("tests"):
        raise ValueError(f"{store.folder} has results already: take another --cache_dir to go on from {path}")
    else:
        store.folder.mkdir(parents=True, exist_ok=True)
        unfinished = store.folder / f"unfinished-{FILE}"
        unfinished.write_text(json.dumps(results))
        unfinished.replace(store.folder / FILE)


def read_earlier(store: Store) -> dict[str, Any]:
    """The results that a store goes on from; empty where there are none."""
    path = store.folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def rate_of(earlier: dict[str, Any], part: Part, method: str) -> float | None:
    """The learning rate that an earlier run chose for a method: in the same table, or else with the main models; or
    else, of a variant of our forms, the one of its form. `None`: nothing is known of it, as on the cross task with
    another number of items or steps, which want other rates."""
    if not earlier:
        return None
    if part.kind == "cross":
        tables = [earlier["cross"].get(part.results_key, {})]
    else:
        of_part = earlier["lora"] if part.lora else earlier["sizes"].get(part.size, {})
        tables = [of_part, earlier["methods"]]
    for name in (method, *([form_of(method)] if is_ours(method) and method not in FORMS else [])):
        for table in tables:
            if rates := table.get(name, {}).get("learning_rates"):
                return rates[0]
    return None
