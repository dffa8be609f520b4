"""Libraries of extras, which figures of gates (`viz`) and the demo (`demo`) need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..install import how_to_install


def needs(module: str, extra: str = "viz") -> ModuleType:
    """Import a module of an extra.

    Raises:
        ModuleNotFoundError: If it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(f"This needs {package}: {how_to_install(extra)}.", name=package) from error
