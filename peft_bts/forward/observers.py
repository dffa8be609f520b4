"""Whom a model tells of its forwards (`run.py`) and its `generate()` calls (this file): traces, see gates.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class Observers(tuple):
    """Whom a model tells of its runs. Copies of the model tell nobody."""

    def __reduce__(self):
        return Observers, ()


@contextmanager
def generation(observers: tuple, model: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Tell observers of a call of `model.generate`: how long its prompt is, and which tokens end a sequence.

    Args:
        args, kwargs: Those of the call.
    """
    if not observers:
        yield
        return
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    prompt = next((value.shape[1] for value in given if isinstance(value, Tensor)), 1)  # 1: the token of its own
    configs = [config for config in (kwargs.get("generation_config"), model.generation_config) if config is not None]
    ends = [kwargs.get("eos_token_id"), *(config.eos_token_id for config in configs)]
    ends = next((torch.as_tensor(end).flatten().tolist() for end in ends if end is not None), [])
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.generating(prompt, ends))
        yield
