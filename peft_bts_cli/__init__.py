"""The command line: `peft-bts COMMAND`, or `python -m peft_bts COMMAND`.

Every command is a function in a file of this package, registered below. It returns a `Result`: what people read, what
`--json` prints, and whether all is well. Bad input is raised as a `ValueError`, which becomes one line on stderr. Exit
codes: 0 if all is well, 1 if a problem was found, 2 if the command was called wrongly. Only `peft-bts run` differs: it
runs another program, and has that program's output and exit code.

This package stands beside `peft_bts`, not in it, and its commands import what they need of that when they run: torch
and transformers take seconds to import, which nobody should wait for who asks for help or has made a slip.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .assess import assess
from .check import check
from .common import run
from .demo import demo
from .eval import eval
from .export import export
from .gates import gates
from .inspect import inspect
from .plan import plan
from .push import push
from .recipes import takes_recipe
from .run_module import run_module
from .train import train


_HELP = "Check, plan, assess, train, inspect, evaluate, show, export and push Branch-Train-Stitch adapters."

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the options' names
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft_bts {version('peft_bts')}")
        raise typer.Exit()


@app.callback(help=_HELP)
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of the program itself."""


for command in (check, plan, assess, inspect, eval, gates, demo, export, push):
    app.command()(run(takes_recipe(command)))
# What follows `train` is a recipe's file and its keys as flags, which `recipes` parses.
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})(run(train))
app.command("run", context_settings={"allow_interspersed_args": False})(run_module)
