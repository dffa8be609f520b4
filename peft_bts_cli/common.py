"""What all commands share: results, errors and options."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer


if TYPE_CHECKING:
    from peft_bts.config import StitchConfig
    from peft_bts.reference import Source


Hub = Annotated[
    str,
    typer.Option("--hub", metavar="ID_OR_PATH", help="The seed model: an id on the Hub (or id@revision) or a folder."),
]
Experts = Annotated[
    list[str],
    typer.Option("--expert", metavar="NAME=ID_OR_PATH", help="An expert. Repeat the option for every expert."),
]
Adapter = Annotated[str, typer.Argument(help="The adapter: an id on the Hub, a folder, or a recipe's file.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="The dtype of the hub and the experts.")
]
TextColumn = Annotated[str, typer.Option(help="The field of a jsonl row that holds its text.")]
MaxTokens = Annotated[Optional[int], typer.Option(min=1, help="Read at most this many tokens of each domain.")]
SequenceLength = Annotated[
    Optional[int],
    typer.Option(
        min=2, help="Tokens per row. Longer documents are cut. Default: 1024, or fewer if a model takes fewer."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
Device = Annotated[
    Optional[str], typer.Option(help="Where to run. Default: the accelerator if there is one, or else cpu.")
]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass
class Result:
    """The outcome of a command.

    Attributes:
        parts: What people read: strings and rich tables.
        data: The same as JSON values, for programs.
        ok: Whether all is well. If not, the exit code is 1.
    """

    parts: list[Any]
    data: Any
    ok: bool = True


def run(command: Callable[..., Result]) -> Callable[..., None]:
    """Turn a function that returns a `Result` into a command: add `--json`, print, and set the exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, json_output: bool, **kwargs: Any) -> None:
        try:
            result = command(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            typer.echo(f"peft-bts {command.__name__}: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        if json_output:
            typer.echo(json.dumps(result.data, indent=2))
        else:
            from rich.console import Console

            from peft_bts.formatting import as_text

            console = Console()
            if console.is_terminal:
                for part in result.parts:
                    console.print(part, markup=False, highlight=False)
            else:  # a file, or another program: nobody there has lines of a certain width
                typer.echo(as_text(*result.parts, width=None))
        if not result.ok:
            raise typer.Exit(1)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON)
    signature = signature.replace(parameters=[*signature.parameters.values(), option])
    vars(wrapper)["__signature__"] = signature
    wrapper.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return wrapper


def by_name(values: list[str], option: str = "--expert", source: str = "ID_OR_PATH") -> dict[str, str]:
    """Read `["code=org/code"]` as `{"code": "org/code"}`. Raise a usage error for anything else."""
    pairs = [value.partition("=") for value in values]
    for value, (name, _, place) in zip(values, pairs):
        if not name or not place:
            raise typer.BadParameter(f"{value!r} is not of the form NAME={source}.", param_hint=option)
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter("every value needs a name of its own.", param_hint=option)
    return {name: place for name, _, place in pairs}


def models_by_name(values: list[str]) -> dict[str, Source]:
    """Read `["code=org/code@v2"]` as experts by name; see `as_source` for what may stand behind a name."""
    from peft_bts.reference import as_source

    return {name: as_source(place) for name, place in by_name(values).items()}


def stitch_config(adapter: str) -> StitchConfig:
    """Read the config of a stitch adapter. Raise a `ValueError` for anything else."""
    from peft import PeftConfig
    from peft.utils import CONFIG_NAME

    from peft_bts._compat.transformers import find_file
    from peft_bts.reference import check_there

    check_there(adapter)
    if find_file(adapter, CONFIG_NAME) is None:
        raise ValueError(f"{adapter!r} holds no {CONFIG_NAME}; expected the folder or id of an adapter.")
    config = PeftConfig.from_pretrained(adapter)
    if config.peft_type != "STITCH":
        raise ValueError(f"{adapter!r} is a {config.peft_type.value} adapter, expected a STITCH adapter.")
    return config
