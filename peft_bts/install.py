"""How this package is installed: the one place that says it, for cards, checkpoints and errors."""

from __future__ import annotations

from typing import Optional


def how_to_install(extra: Optional[str] = None) -> str:
    """A command, and where to run it.

    Args:
        extra: The optional dependencies that are to be installed too, such as `"viz"`.
    """
    package = "." if extra is None else f'".[{extra}]"'
    return f"`pip install {package}` in a clone of peft_bts"
