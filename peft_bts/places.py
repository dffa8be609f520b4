"""Paths in an adapter's config: relative to the adapter's folder in its file, absolute in memory.

So a folder that holds an adapter and its models can be moved as a whole. Only paths beside or below the adapter's
folder are written that way, as `../seed` or `./code`; a file that has some says so by `MARK`. In files without it,
which older versions wrote, paths are what the user once gave: absolute, or relative to the working directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union


MARK, _ADAPTER = "paths_relative_to", "adapter"
_SOURCES = ("model", "adapter")  # keys of a reference that may hold a path
PathLike = Union[str, os.PathLike[str]]


def to_file(values: dict[str, Any], folder: PathLike) -> dict[str, Any]:
    """The values of a config as they are written to the file in `folder`."""
    here = Path(os.path.realpath(folder))
    written = _replace(values, lambda source: _written(source, here))
    relative = _replace(written, lambda source: None if _is_relative(source) else source)
    return written if relative == written else {**written, MARK: _ADAPTER}


def from_file(values: dict[str, Any], folder: PathLike) -> dict[str, Any]:
    """The values of a config that was read from the file in `folder`, with absolute paths."""
    if values.get(MARK) != _ADAPTER:
        return values
    here = os.path.realpath(folder)
    return _replace(
        without_mark(values),
        lambda source: os.path.normpath(os.path.join(here, source)) if _is_relative(source) else source,
    )


def without_mark(values: dict[str, Any]) -> dict[str, Any]:
    """The values with their paths as they stand there, which then lead nowhere."""
    return {key: value for key, value in values.items() if key != MARK}


def same_places(source: dict[str, Any]) -> dict[str, Any]:
    """A reference whose paths are absolute, for comparisons: `models/code` is what a file may have led to, too."""
    return {
        key: os.path.abspath(value) if key in _SOURCES and isinstance(value, str) and os.path.exists(value) else value
        for key, value in source.items()
    }


def _written(source: str, here: Path) -> str:
    if not os.path.exists(source):  # the id of a repository, or a folder that is gone
        return source
    absolute = Path(os.path.abspath(source))
    place = Path(os.path.realpath(absolute.parent), absolute.name)  # a link beside the adapter moves along with it
    around = here.parent if here.parent != here.parent.parent else here  # all is below the root
    if not place.is_relative_to(around):
        return str(absolute)
    relative = Path(os.path.relpath(place, here)).as_posix()
    return relative if _is_relative(relative) else f"./{relative}"


def _is_relative(source: str) -> bool:
    """Return whether this is how files write a path from the adapter's folder; ids of repositories never start so."""
    return source in (".", "..") or source.startswith(("./", "../"))


def _replace(values: dict[str, Any], change: Callable[[str], Any]) -> dict[str, Any]:
    """Change all that may be paths; what a file has in their places may be of any type."""

    def changed(source: Any) -> Any:
        return change(str(source)) if isinstance(source, str) else source

    def reference(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return changed(entry)
        return {key: changed(value) if key in _SOURCES else value for key, value in entry.items()}

    experts = values.get("experts")
    if isinstance(experts, dict):
        values = {**values, "experts": {name: reference(entry) for name, entry in experts.items()}}
    if "base_model_name_or_path" in values:
        values = {**values, "base_model_name_or_path": changed(values["base_model_name_or_path"])}
    return values
