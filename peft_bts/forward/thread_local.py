"""State of calls under way: one value for each thread, and never part of a copy of the model."""

from __future__ import annotations

import threading
from typing import Generic, Optional, TypeVar

import torch


T = TypeVar("T")


class Transient:
    """Belongs to calls under way: copies and pickles of the model it hangs on start with a fresh one."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class ThreadLocal(Transient, Generic[T]):
    """A slot with one value for each thread, so that threads can share a model.

    torch.compile cannot trace thread locals; while it traces, the value is a plain attribute, which it sees through.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: Optional[T] = None

    def get(self) -> Optional[T]:
        """The value of this thread; `None` where none was set."""
        if torch.compiler.is_compiling():
            return self._traced
        value: Optional[T] = getattr(self._local, "value", None)
        return self._traced if value is None else value  # a forward of which only parts are compiled

    def set(self, value: Optional[T]) -> None:
        if torch.compiler.is_compiling():
            self._traced = value
        else:
            self._local.value = value
