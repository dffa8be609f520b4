"""`peft-bts run`: programs that load PEFT adapters and have never heard of this package, such as lm_eval."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import Annotated

import typer


def run_module(
    module: Annotated[str, typer.Argument(help="What `python -m` takes, such as lm_eval.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
) -> None:
    """Run a Python module as `python -m MODULE` does, with stitch adapters known to PEFT, as by `import peft_bts`."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        typer.echo(f"peft-bts run: there is no module {module!r} here; is it installed in this environment?", err=True)
        raise typer.Exit(1)
    sys.argv = [module, *(arguments or [])]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
