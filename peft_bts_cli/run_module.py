"""`peft-bts run`: for programs that load PEFT adapters but do not import this package, such as lm_eval."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import Annotated

import typer


def run_module(
    module: Annotated[str, typer.Argument(help="The module, such as lm_eval.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The arguments of the module.")] = None,
) -> None:
    """Run a Python module as `python -m MODULE` does, after `import peft_bts`, so that it can load stitch adapters."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        typer.echo(f"peft-bts run: there is no module {module!r} here; is it installed in this environment?", err=True)
        raise typer.Exit(1)
    import peft_bts  # noqa: F401  registers the method

    sys.argv = [module, *(arguments or [])]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
