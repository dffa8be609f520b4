"""Methods of other libraries' classes, and functions of their modules, taken and replaced.

Both are untyped: no checker can follow a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Union


def function_of(owner: Union[type, ModuleType], name: str) -> Callable[..., Any]:
    """A module's function, or that behind a method or class method; of a class method, it takes the class first."""
    method = getattr(owner, name)
    return getattr(method, "__func__", method)


def replace_method(owner: Union[type, ModuleType], name: str, method: Any) -> None:
    """Put a function, or a `classmethod` object, in the place of a method, or of a module's function."""
    setattr(owner, name, method)
