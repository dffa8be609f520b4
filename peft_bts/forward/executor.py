"""How the experts' streams get from stitch to stitch.

A forward hands its streams to an *executor* and asks it, at each stitch, for the experts' states there. The one below
runs one stream after the other. Others (`inference/threads.py`, `inference/stacking.py`) run them at other times, on
other threads, or several as one; what each layer computes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Optional, Protocol

from torch import Tensor
from transformers import Cache

from .composition import Composition
from .stream import Checkpoint, Stream, StreamLike


Boundary = Callable[[StreamLike], int]  # how many of its layers a stream is to have run


class Executor(Protocol):
    """What a forward asks of an executor. The keys are those of the streams, mostly experts' names."""

    def look_ahead(self, boundary: Boundary) -> None:
        """Take note that the states are final and where the next stitch is: streams may run on from now on."""
        ...

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        """Bring every stream up to a stitch; return the hidden states there, each (B, T, D_i).

        `checkpoint` is the hub's gradient checkpointing function while that is in use.
        """
        ...

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        """Go on from these hidden states, which a stitch has made."""
        ...

    def close(self) -> None:
        """End the forward, whether it succeeded or not: nothing of it may run on. Raises nothing."""
        ...


# Makes the executor of a forward, from what it runs, its streams as they have just begun, and the experts' caches.
MakeExecutor = Callable[[Composition, dict[Hashable, Stream], Mapping[str, Cache]], Executor]


class SequentialExecutor:
    """Runs the streams one after the other, when a stitch asks for them."""

    def __init__(self, streams: Mapping[Hashable, StreamLike]) -> None:
        self.streams = streams

    def look_ahead(self, boundary: Boundary) -> None:
        """Nothing runs ahead."""

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        return {key: stream.advance(boundary(stream), checkpoint) for key, stream in self.streams.items()}

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        for key, stream in self.streams.items():
            stream.state = states[key].to(stream.state.device)

    def close(self) -> None:
        """Nothing runs on."""


def run_in_turn(
    composition: Composition, streams: dict[Hashable, Stream], caches: Mapping[str, Cache]
) -> SequentialExecutor:
    """Make the default executor (a `MakeExecutor`)."""
    return SequentialExecutor(streams)
