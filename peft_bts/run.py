"""One forward of a stitched model: the hub's call, the experts' streams, and what happens at a stitch.

The hub runs its own loop over its own layers; it must not know that it has company. What the stitches need to
know of the forward under way, they find in a `Run`, which lives from the hub's backbone being called until it
returns. Threads have their own, and a forward inside a forward has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor, nn
from transformers import Cache

from .cache import find_cache, join_caches
from .config import EXPERTS_INTO_HUB, expert_boundary
from .experts import Expert, Stream


@dataclass
class Plan:
    """What one adapter runs: its stitches' kinds by hub layer, and its experts by name."""

    schedule: dict[int, str]
    hub_layers: int
    hub_config: Any  # the hub's text config
    experts: dict[str, Expert]
    projected: bool  # expert_streams="projected"


class Run:
    """The state of one forward.

    Args:
        plan: What the active adapter runs; `None` while no adapter is active or all are disabled.
        call: The arguments of the hub's backbone, by name.
        outer: The run that this one interrupts: that of a forward in whose middle this forward was called.
    """

    def __init__(self, plan: Optional[Plan], call: dict[str, Any], outer: Optional[Run]) -> None:
        self.plan, self.call, self.outer = plan, call, outer
        self.streams: Optional[dict[str, Stream]] = None

    def _open(self, cache: Optional[Cache]) -> dict[str, Stream]:
        experts = self.plan.experts
        caches = {} if cache is None else join_caches(cache, self.plan.hub_layers, experts)
        return {
            name: experts[name].start(self.call, caches.get(name), self.plan.hub_config) for name in sorted(experts)
        }

    def cross(self, layer: int, stitch: nn.Module, hub_BTD: Tensor, args: tuple, kwargs: dict, checkpoint) -> Tensor:
        """Bring every expert up to the stitch behind a hub layer, apply it, and return the hub's new state.

        Args:
            layer: 0-based hub layer that has just run.
            stitch: `ExpertsIntoHub` or `HubIntoExperts`.
            hub_BTD: The hub layer's hidden states.
            args, kwargs: What the hub layer was called with; the cache is among them.
            checkpoint: The hub's gradient checkpointing function while it is in use, else `None`.
        """
        if self.streams is None:
            # transformers drops the cache while it checkpoints gradients: the recomputation would fill it twice.
            self.streams = self._open(find_cache(args, kwargs) if checkpoint is None else None)
        plan, streams = self.plan, self.streams
        states = {}
        for name, stream in streams.items():
            boundary = expert_boundary(layer + 1, plan.hub_layers, plan.experts[name].num_layers)
            states[name] = stream.advance(boundary, checkpoint).to(hub_BTD.device)
        if stitch.kind == EXPERTS_INTO_HUB:
            hub_BTD, new_states = stitch(hub_BTD, states)
            if not plan.projected:
                return hub_BTD
        else:
            new_states = stitch(hub_BTD, states)
        for name, stream in streams.items():
            stream.state = new_states[name].to(stream.state.device)
        return hub_BTD


def checkpoint_function(layer: nn.Module) -> Optional[Callable]:
    """The function under which transformers recomputes this hub layer in the backward pass, if it does so now."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func
    return None
