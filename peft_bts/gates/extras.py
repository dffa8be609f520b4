"""Libraries of the `viz` extra, which tables and figures of gates need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..install import how_to_install


def needs(module: str) -> ModuleType:
    """Import a module of the `viz` extra.

    Raises:
        ModuleNotFoundError: If it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(f"This needs {package}: {how_to_install('viz')}.", name=package) from error
