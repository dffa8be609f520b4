"""How the experts' streams get from stitch to stitch.

A forward hands its streams to an *executor* and asks it, at each stitch, for the experts' states there. The one below
runs one stream after the other. Others (in `inference/`) run them at other times, on other threads, or several as one;
what each layer computes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Optional, Protocol

from torch import Tensor

from ..stitch import Stitch
from .stream import Checkpoint, Stream


Boundary = Callable[[Stream], int]  # how many of its layers a stream is to have run
# Applies a stitch: from the hub's and all experts' hidden states to their new ones.
Mix = Callable[[Tensor, dict[Any, Tensor]], tuple[Tensor, dict[Any, Tensor]]]
Advance = Callable[[], dict[Any, Tensor]]  # returns the experts' hidden states


class Executor(Protocol):
    """The protocol of an executor, as a forward uses it. The keys are those of the streams, mostly experts' names.

    Attributes:
        spread: Whether other processes run some of the models.
    """

    spread: bool

    def run_hub(self, hub: Callable[[], Any]) -> Any:
        """Run the hub's backbone, by calling `hub` or in a way that comes to the same; return what it returns."""
        ...

    def look_ahead(self, boundary: Boundary) -> None:
        """Take note that the states are final and where the next stitch is: streams may run on from now on."""
        ...

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        """Bring every stream up to a stitch; return the hidden states there, each (B, T, D_i).

        `checkpoint` is the hub's gradient checkpointing function while that is in use.
        """
        ...

    def stitch(
        self, layer: int, stitch: Stitch, mix: Mix, hub_BTD: Tensor, advance: Advance
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Have the stitch behind a hub layer computed; return the new states of the models that run here.

        Args:
            layer: The hub's, 0-based.
            stitch: The stitch.
            mix: Computes it, where all states are.
            hub_BTD: The hub's state, if it runs here; else anything of the same shape.
            advance: Brings the streams up to the stitch, by the executor's own `advance`.
        """
        ...

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        """Go on from these hidden states, which a stitch has made."""
        ...

    def go_on(self, hub_BTD: Tensor) -> Tensor:
        """Behind a stitch that is not the last: the hub's new state, from which it goes on, wherever it runs."""
        ...

    def share(self, names: Sequence[str], values: list[Tensor]) -> list[Tensor]:
        """Return what models say of some tokens, wherever they run: a value of the same shape for each.

        Args:
            names: The models', the hub's first; its head is everywhere.
            values: What those that run here say; for others, anything of the same shape.
        """
        ...

    def agree(self, values: Tensor) -> Tensor:
        """The same numbers, to the last bit, wherever models run: for decisions that must not differ."""
        ...

    def close(self) -> None:
        """End the forward, whether it succeeded or not: nothing of it may run on. Raises nothing."""
        ...


class InOneProcess:
    """Base of executors that run all models here: there is nobody to exchange anything with."""

    spread = False

    def stitch(
        self, layer: int, stitch: Stitch, mix: Mix, hub_BTD: Tensor, advance: Advance
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        return mix(hub_BTD, advance())

    def go_on(self, hub_BTD: Tensor) -> Tensor:
        return hub_BTD

    def share(self, names: Sequence[str], values: list[Tensor]) -> list[Tensor]:
        return values

    def agree(self, values: Tensor) -> Tensor:
        return values


class SequentialExecutor(InOneProcess):
    """Runs the streams one after the other, when a stitch asks for them."""

    def __init__(self, streams: Mapping[Hashable, Stream]) -> None:
        self.streams = streams

    def run_hub(self, hub: Callable[[], Any]) -> Any:
        return hub()

    def look_ahead(self, boundary: Boundary) -> None:
        """Nothing runs ahead."""

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        return {key: stream.advance(boundary(stream), checkpoint) for key, stream in self.streams.items()}

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        for key, stream in self.streams.items():
            stream.state = states[key].to(stream.state.device)

    def close(self) -> None:
        """Nothing runs on."""
