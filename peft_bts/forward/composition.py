"""What one adapter runs: its stitches, its experts, and where each expert meets each stitch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Protocol

from torch import Tensor
from transformers import Cache

from ..config import StitchKind, expert_boundary
from .stream import Stream


class StitchableExpert(Protocol):
    """The protocol of an expert in a forward: `Expert` follows it for adapters, exported models for theirs.

    Attributes:
        config: Its text config.
        key: Tells experts apart; a cache that was filled by one cannot be continued by another.
        embedding_width: Channels of its token embeddings.
        is_stateful: Whether it keeps recurrent states, from which tokens cannot be taken back.
    """

    @property
    def config(self) -> Any: ...

    @property
    def key(self) -> str: ...

    @property
    def embedding_width(self) -> int: ...

    @property
    def is_stateful(self) -> bool: ...

    def __call__(self, call: dict[str, Any], cache: Optional[Cache], hub_config: Any) -> Stream:
        """Begin a forward on the arguments of the hub's call, see `ArgumentRecorder.record`."""
        ...

    def logits(self, state_BTD: Tensor) -> Tensor:
        """From its hidden states behind its last layer to its logits, (B, T, V_i); for mixtures."""
        ...


@dataclass(frozen=True)
class Composition:
    """The stitches and experts that one adapter runs.

    Attributes:
        schedule: Kind of the stitch behind each stitched hub layer, in order (`stitch_schedule`).
        hub_layers: Number of the hub's decoder layers.
        hub_config: The hub's text config.
        experts: The experts that take part, by name.
        projected: Whether Experts-into-Hub replaces the experts' states (`expert_streams="projected"`).
        adapter: The adapter's name.
        mixture: Whether the models' distributions are mixed (`output="mixture"`).
        forgetting: If their gates see how well each model has predicted the tokens so far, the forgetting factor.
    """

    schedule: Mapping[int, StitchKind]
    hub_layers: int
    hub_config: Any
    experts: Mapping[str, StitchableExpert]
    projected: bool
    adapter: str = ""
    mixture: bool = False
    forgetting: Optional[float] = None

    def next_stitch(self, layer: int) -> Optional[int]:
        """The first stitched hub layer behind `layer`; `None` behind the last one."""
        return next((index for index in self.schedule if index > layer), None)

    def boundary(self, layer: int) -> Callable[[Stream], int]:
        """For the stitch behind hub layer `layer`: how many of its own layers a stream has run by then."""
        return lambda stream: expert_boundary(layer + 1, self.hub_layers, stream.num_layers)
