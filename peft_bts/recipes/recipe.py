"""`Recipe`: read from a YAML file and flags, and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..config import StitchConfig
from ..reference import Source, as_source
from .data import Domain, as_domain
from .options import GROUPS, DataOptions, ModelOptions, StitchOptions, TrainingOptions


_KEYS: dict[str, Any] = {}
for _group in GROUPS:
    _hints = get_type_hints(_group)
    _KEYS |= {f.name: _hints[f.name] for f in dataclasses.fields(_group) if f.init}
_MAPPINGS = ("experts", "datasets", "evaluation")  # in a file; as flags, NAME=VALUE


class RecipeParser(HfArgumentParser):
    """A parser of a recipe's keys as flags. Raises `ValueError` where argparse would end the process."""

    def __init__(self) -> None:
        super().__init__(
            GROUPS,
            prog="peft-bts train",
            usage="peft-bts train [RECIPE.yaml] [--KEY VALUE ...]",
            description="Train stitches. Every key of a recipe is a flag, too; flags come before the file.",
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError` that names the key."""
        raise ValueError(re.sub(r"^argument --(\w+)\S*: ", r"\1: ", message))

    def given(self, flags: list[str]) -> dict[str, Any]:
        """The values of flags that are there, and of no others.

        Raises:
            ValueError: If a flag is unknown, or a value is of the wrong type.
        """
        self.set_defaults(**dict.fromkeys(_KEYS))  # None: no flag gives that
        values, rest = self.parse_known_args(flags)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("--"):
                raise ValueError(f"{rest[0]!r} belongs to no flag. A recipe's file comes first, and ends in .yaml.")
            raise ValueError(f"There is no flag {name}{_nearest(name[2:].replace('-', '_'), '--')}")
        return {key: value for key, value in vars(values).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says: hub, experts, options of the stitches, data, and training.

    Attributes:
        given: What was set, by file or by flag; all else has its default.
        models, data: These parts, with defaults.
        domains: The training data by name.
        evaluation: Where evaluation data comes from, by name.
    """

    given: dict[str, Any]
    models: ModelOptions
    data: DataOptions
    domains: dict[str, Domain]
    evaluation: dict[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe of values as `RecipeParser.given` returns them.

        Raises:
            ValueError: If a name is there twice, or a value makes no sense.
        """
        domains = {
            name: as_domain(name, value) for name, value in by_name("datasets", values.get("datasets", [])).items()
        }
        evaluation = {
            name: as_domain(name, value).source
            for name, value in by_name("evaluation", values.get("evaluation", [])).items()
        }
        models, data = _part(ModelOptions, values), _part(DataOptions, values)
        recipe = cls(dict(values), models, data, domains, evaluation)
        for key, least in (("held_out", 0), ("block_size", 2)):
            if getattr(data, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(data, key)}.")
        recipe.config()
        return recipe

    @property
    def hub(self) -> Source:
        """The seed model."""
        return as_source(self.models.hub)

    @property
    def experts(self) -> dict[str, Source]:
        """The experts by name."""
        return {name: as_source(value) for name, value in by_name("experts", self.given.get("experts", [])).items()}

    @property
    def output_dir(self) -> str:
        """The adapter's folder."""
        return str(self.given.get("output_dir", ""))

    def require(self, *keys: str) -> None:
        """Check that the recipe has what a command needs.

        Raises:
            ValueError: If it has not; names all that is missing.
        """
        missing = [key for key in keys if not self.given.get(key)]
        if missing:
            raise ValueError(
                f"The recipe has no {' and no '.join(missing)}; add it to the file, or give --{missing[0]}."
            )

    def config(self) -> StitchConfig:
        """The configuration of the adapter.

        Raises:
            ValueError: If an option or a reference makes no sense.
        """
        options = dataclasses.asdict(_part(StitchOptions, self.given))
        revision = self.hub.get("revision") if isinstance(self.hub, dict) else None
        return StitchConfig(task_type="CAUSAL_LM", experts=self.experts, revision=revision, **options)

    def training_arguments(self) -> TrainingOptions:
        """Return what a Trainer takes. Raises `ValueError` where transformers does."""
        return _part(TrainingOptions, self.given)

    def to_yaml(self) -> str:
        """The recipe as a file: what was set, and nothing else."""
        values = dict(self.given)
        if "experts" in values:
            values["experts"] = self.experts
        if "datasets" in values:
            values["datasets"] = {name: dataclasses.asdict(domain) for name, domain in self.domains.items()}
        if "evaluation" in values:
            values["evaluation"] = self.evaluation
        return yaml.safe_dump(values, sort_keys=False, width=1000)

    def differs_from(self, other: Recipe) -> Optional[str]:
        """The first key by which the models, the data or the stitches of two recipes differ; training may."""
        for group in (ModelOptions, DataOptions, StitchOptions):
            for name in (f.name for f in dataclasses.fields(group) if not f.name.startswith("push_")):
                if self._value(name) != other._value(name):
                    return name
        return None

    def _value(self, key: str) -> Any:
        parts: dict[str, Any] = {"experts": self.experts, "datasets": self.domains, "evaluation": self.evaluation}
        return parts[key] if key in parts else self.given.get(key)


def read_recipe(arguments: list[str]) -> Recipe:
    """Read a recipe from the arguments of a command: a file's name, if there is one, then flags, which come before it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML mapping, a key is unknown, or a value is of the wrong type.
    """
    values: dict[str, Any] = {}
    if arguments and is_recipe(arguments[0]):
        values, arguments = _read_file(Path(arguments[0])), arguments[1:]
    return Recipe.of({**values, **RecipeParser().given(arguments)})


def is_recipe(argument: str) -> bool:
    """Return whether an argument of a command names a recipe's file, by its ending."""
    return Path(argument).suffix in (".yaml", ".yml") and not argument.startswith("-")


def by_name(key: str, values: list[str]) -> dict[str, str]:
    """Read `["code=org/code"]` as `{"code": "org/code"}`.

    Raises:
        ValueError: If a value is of another form, or a name is there twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, _, source = value.partition("=")
        if not re.fullmatch(r"\w+", name) or not source:
            raise ValueError(f"{key}: {value!r} is not of the form NAME=VALUE, with a name of letters and digits.")
        if name in found:
            raise ValueError(f"{key} gives the name {name!r} twice.")
        found[name] = source
    return found


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no recipe {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} holds no keys with values; a recipe begins like `hub: org/seed`.")
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{path} has an unknown key {key!r}{_nearest(key)}")
    try:
        flags = [flag for key, value in values.items() for flag in _as_flags(key, value)]
        return RecipeParser().given(flags)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_flags(key: str, value: Any) -> list[str]:
    """A key of a file as on the command line, so that types are checked in one way."""
    is_list = "list" in str(_KEYS[key])
    if value is None:
        raise ValueError(f"{key} has no value; leave the key out for its default.")
    if isinstance(value, dict) and key in _MAPPINGS:
        value = [f"{name}={one if isinstance(one, str) else json.dumps(one)}" for name, one in value.items()]
    if isinstance(value, dict) and "dict" in str(_KEYS[key]):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list) and is_list and value:
        return [f"--{key}", *map(str, value)]
    if isinstance(value, (dict, list)):
        raise ValueError(f"{key} takes {'a list of values' if is_list else 'one value'}, got {value!r}.")
    if key in _MAPPINGS:
        raise ValueError(f"{key} takes a mapping of names, such as `code: ...`, got {value!r}.")
    return [f"--{key}={value}"]


def _part(kind: type[Any], values: Mapping[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    return kind(**{name: value for name, value in values.items() if name in names})


def _nearest(key: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(key, _KEYS, 1, 0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ". `peft-bts train --help` lists all."
