"""What every benchmark does with its results: files, tables, figures."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine (or its GPU), and the versions of the libraries that results depend on."""
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {"machine": chip or platform.machine(), "versions": versions}


def commit() -> str:
    """The commit that this code is of, with "-dirty" where files differ from it; "unknown" outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write JSON that people read. An interrupted run leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(rounded(results), indent=1) + "\n")
    os.replace(unfinished, path)


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, in lists and dictionaries too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def table(head: list[str], rows: Iterable[list[Any]], left: int = 1) -> str:
    """A Markdown table, whose first `left` columns are flush left, and the others right."""
    rules = ["---" if column < left else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, rules, *rows))


def show(markdown: str, width: int | None = None) -> None:
    """Print Markdown as a terminal can show it."""
    Console(width=width).print(Markdown(markdown))


def save_figures(figures: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write matplotlib figures as `folder`/<name>.png; returns the paths from a page beside the folder, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    return {name: f"{folder.name}/{name}.png" for name in figures}
