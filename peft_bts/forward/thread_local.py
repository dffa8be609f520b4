"""State of a forward under way, when several threads call one model."""

from __future__ import annotations

import threading
from typing import Any

import torch


class PerThread:
    """A slot with one value per thread, so that threads can share a model.

    torch.compile cannot trace thread locals; while it traces, the value is a plain attribute, which it sees through.
    Copies of a model (deepcopy, pickle) start with an empty slot.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: Any = None

    def get(self) -> Any:
        if torch.compiler.is_compiling():
            return self._traced
        value = getattr(self._local, "value", None)
        return self._traced if value is None else value  # a forward of which only parts are compiled

    def set(self, value: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced = value
        else:
            self._local.value = value

    def __reduce__(self):
        return PerThread, ()


class Turnstile:
    """A lock of one model. Copies of the model have a free one of their own."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self.acquire, self.release = lock.acquire, lock.release

    def __reduce__(self):
        return Turnstile, ()
