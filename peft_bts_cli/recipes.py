"""A recipe in the place of a command's flags: `peft-bts plan recipe.yaml`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from .common import Result


_ASKED = ("hub", "expert", "data")  # options that a command needs, and a recipe can give
_FLAGS = {"hub": "--hub", "expert": "--expert", "data": "--data"}
_RECIPE = Annotated[
    Optional[str], typer.Argument(metavar="[RECIPE]", help="A recipe's file, which says what options below do not.")
]


def takes_recipe(command: Callable[..., Result]) -> Callable[..., Result]:
    """Let a command take a recipe's file: as its first argument, or in the place of its adapter.

    The recipe says what is not given as an option. The adapter is the one in the recipe's output folder.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = dict(signature.parameters)
    asked = [name for name in _ASKED if name in parameters and parameters[name].default is inspect.Parameter.empty]

    @functools.wraps(command)
    def wrapper(context: typer.Context, recipe: Optional[str] = None, **kwargs: Any) -> Result:
        place = kwargs.get("adapter", recipe)
        if place is not None and _is_recipe(place):
            from peft_bts.recipes.recipe import read_recipe

            given = {name for name in kwargs if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
            kwargs |= _values(read_recipe([place]), {*kwargs}, given - {"adapter"})
        elif recipe is not None:
            raise typer.BadParameter(f"{recipe!r} is no recipe; its name would end in .yaml.", param_hint="RECIPE")
        for name in asked:
            if not kwargs[name]:
                raise typer.BadParameter("give it, or a recipe.", param_hint=_FLAGS[name])
        return command(**kwargs)

    kinds = inspect.Parameter
    added = [kinds("context", kinds.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    if "adapter" not in parameters:
        added.append(kinds("recipe", kinds.POSITIONAL_OR_KEYWORD, default=None, annotation=_RECIPE))
    for name in asked:
        parameters[name] = parameters[name].replace(default=None)
    # With defaults now amid them, all but the first are by keyword; typer asks for them in this order.
    rest = [parameter.replace(kind=kinds.KEYWORD_ONLY) for parameter in parameters.values()]
    vars(wrapper)["__signature__"] = signature.replace(parameters=[*added, *rest])
    return wrapper


def _is_recipe(place: str) -> bool:
    from peft_bts.recipes.recipe import is_recipe

    return is_recipe(place)


def _values(recipe: Any, names: set[str], given: set[str]) -> dict[str, Any]:
    """Return what a recipe says about the parameters of a command, except for those that are given."""
    from peft_bts.recipes.evaluation import evaluation_files

    needed = {"adapter": "output_dir", "hub": "hub", "expert": "experts"}
    recipe.require(*(key for name, key in needed.items() if name in names - given))
    values = {"adapter": recipe.output_dir, "hub": recipe.models.hub, "expert": recipe.models.experts}
    for name in {"data", "file"} & names - given:
        if name == "data" or "text" not in given:
            values[name] = [f"{domain}={file}" for domain, file in evaluation_files(recipe).items()]
    evaluates = {"adapter", "data"} & names  # `plan` is about training
    batch = "per_device_eval_batch_size" if evaluates else "per_device_train_batch_size"
    renamed = {
        "block_size": "sequence_length",
        batch: "batch_size",
        "activation_checkpointing": "gradient_checkpointing",  # newer versions of transformers call it so
    }
    values |= {renamed.get(key, key): value for key, value in recipe.given.items()}
    return {name: values[name] for name in values if name in names - given}
