"""Methods of other libraries' classes, taken and replaced. Both are untyped: no checker can follow a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def function_of(owner: type, name: str) -> Callable[..., Any]:
    """The function behind a method or class method; of a class method, it takes the class first."""
    method = getattr(owner, name)
    return getattr(method, "__func__", method)


def replace_method(owner: type, name: str, method: Any) -> None:
    """Put a function, or a `classmethod` object, in the place of a method."""
    setattr(owner, name, method)
