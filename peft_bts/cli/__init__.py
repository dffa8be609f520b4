"""The command line: `peft-bts COMMAND`, or `python -m peft_bts COMMAND`.

A command is a function in a file of this package, registered with `app.command()`. It returns a `Result`: what people
read, what `--json` prints, and whether all is well. Bad input is raised as `ValueError`; it becomes a line on stderr.
Exit codes: 0 all is well, 1 a problem was found, 2 the command was called wrongly. `peft-bts run` alone is another
program's command line, with that program's output and exit code.
"""

from __future__ import annotations

import typer

from .check import check
from .common import run
from .eval import eval
from .export import export
from .gates import gates
from .inspect import inspect
from .plan import plan
from .run_module import run_module


app = typer.Typer(
    help="Plan, check, look into, evaluate and export Branch-Train-Stitch adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (check, plan, inspect, eval, gates, export):
    app.command()(run(command))
app.command("run", context_settings={"allow_interspersed_args": False})(run_module)
