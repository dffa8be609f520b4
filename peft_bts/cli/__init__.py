"""The command line: `peft-bts COMMAND`, or `python -m peft_bts COMMAND`.

Every command is a function in a file of this package, registered below. It returns a `Result`: what people read, what
`--json` prints, and whether all is well. Bad input is raised as a `ValueError`, which becomes one line on stderr. Exit
codes: 0 if all is well, 1 if a problem was found, 2 if the command was called wrongly. Only `peft-bts run` differs: it
runs another program, and has that program's output and exit code.
"""

from __future__ import annotations

import typer

from .assess import assess
from .check import check
from .common import run
from .eval import eval
from .export import export
from .gates import gates
from .inspect import inspect
from .plan import plan
from .run_module import run_module


app = typer.Typer(
    help="Check, plan, assess, inspect, evaluate and export Branch-Train-Stitch adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the options' names
)
for command in (check, plan, assess, inspect, eval, gates, export):
    app.command()(run(command))
app.command("run", context_settings={"allow_interspersed_args": False})(run_module)
