"""Observers: told of a model's forwards, with their gates, and of its `generate()` calls. Traces are observers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Optional, Protocol

import torch
from torch import Tensor
from transformers import Cache

from .cache import cached_tokens
from .composition import Composition


class Observer(Protocol):
    """Who wants to be told of forwards and of `generate()` calls."""

    def record(self, observation: Observation) -> None:
        """Take in a forward whose last stitch is done."""
        ...

    def generating(self, prompt: int, ends: list[int]) -> AbstractContextManager[None]:
        """Enclose a `generate()` call: the length of its prompt, and the tokens that end a sequence."""
        ...


class Observation:
    """The message to observers about one forward.

    Attributes:
        composition, call: What ran, and the arguments of the hub's backbone by name.
        cache: The hub's cache, or `None`.
        past: Tokens that the cache held before; `None` where it does not tell.
        gates: By hub layer and model: a token's gate, the mean over its channels, (B, T).
    """

    def __init__(
        self, composition: Composition, call: dict[str, Any], cache: Optional[Cache], observers: Sequence[Observer]
    ) -> None:
        self.composition, self.call, self.cache, self._observers = composition, call, cache, observers
        self.past = cached_tokens(cache)
        self.gates: dict[int, dict[str, Tensor]] = {}

    @torch.compiler.disable
    def note_gates(self, layer: int, gates: dict[str, Tensor]) -> None:
        """Take in gates of the stitch behind a hub layer, by model: (B, T, D_gate)."""
        for name, gate in gates.items():
            # Channels are not kept: a trace of them would be as large as all hidden states.
            dtype = torch.promote_types(gate.dtype, torch.float32)
            self.gates.setdefault(layer, {})[name] = gate.detach().mean(dim=-1, dtype=dtype)

    @torch.compiler.disable
    def finish(self) -> None:
        """Tell the observers: the last stitch is done."""
        for observer in self._observers:
            observer.record(self)


@contextmanager
def observed_generation(
    observers: Sequence[Observer], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
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
    asked = [kwargs.get("eos_token_id"), *(config.eos_token_id for config in configs)]
    ends = next((torch.as_tensor(end).flatten().tolist() for end in asked if end is not None), [])
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.generating(prompt, ends))
        yield
