"""`peft-bts train`: the stitches of a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import redirect_stdout
from typing import Annotated, Optional

import typer

from .common import Result


def train(
    arguments: Annotated[
        Optional[list[str]], typer.Argument(help="A recipe's file, and flags that come before what it says.")
    ] = None,
) -> Result:
    """Train the stitches of a recipe, or go on with a run that was cut off. `train --help` lists all keys."""
    from peft_bts.formatting import table
    from peft_bts.recipes.recipe import RecipeParser, read_recipe
    from peft_bts.recipes.training import train as make

    given = arguments or []
    if not given or {"--help", "-h"} & {*given}:
        RecipeParser().print_help()
        raise typer.Exit(0 if given else 2)
    recipe = read_recipe(given)
    with redirect_stdout(sys.stderr):  # Trainer's logs; what comes out at the end is the result
        found = make(recipe, _command(given))
    if not found.is_main:
        raise typer.Exit(0)
    domains = list(found.losses["after training"])
    rows = [(who, *(f"{row[name]:.4f}" for name in domains)) for who, row in found.losses.items()]
    parts = [
        table("Losses by domain, in nats per token", ["", *domains], rows),
        f"Wrote {found.folder}, trained for {found.steps:,} steps.",
    ]
    return Result(parts, {"folder": found.folder, "steps": found.steps, "losses": found.losses})


def _command(arguments: list[str]) -> str:
    """The command that people can repeat: several processes are `accelerate`'s."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    program = f"accelerate launch --num_processes {processes} -m peft_bts" if processes > 1 else "peft-bts"
    return f"{program} train {shlex.join(arguments)}"
