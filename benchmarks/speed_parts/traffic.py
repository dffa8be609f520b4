"""What the processes of a stitched model send to each other, by formula: bytes of all of them together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peft_bts.config import EXPERTS_INTO_HUB


@dataclass(frozen=True)
class Spread:
    """A stitched model over processes, the hub on the first.

    Attributes:
        width: Of all models.
        schedule: The kind of each stitch, in order.
        experts: The process of each expert.
        processes: How many there are.
        state_bytes: Of a number in a hidden state.
        stitch_bytes: Of a number in a stitch.
    """

    width: int
    schedule: Sequence[str]
    experts: Sequence[int]
    processes: int
    state_bytes: int = 4
    stitch_bytes: int = 4


def without_gradients(spread: Spread) -> int:
    """Per token of a forward: experts' projections go to the hub's process, its states to those with experts.

    The last state of the hub goes to everybody.
    """
    away = [process for process in spread.experts if process != 0]
    state, projection = spread.width * spread.state_bytes, spread.width * spread.stitch_bytes
    into_hub = sum(kind == EXPERTS_INTO_HUB for kind in spread.schedule)
    into_experts = len(spread.schedule) - into_hub
    return into_hub * len(away) * projection + (into_experts * len(set(away)) + spread.processes - 1) * state


def in_training(spread: Spread) -> int:
    """Per token of a step: all states go to all, forward; behind all stitches but the last, so do their gradients.

    Every process sends as much as the one with most models.
    """

    def most(hub: bool, experts: bool) -> int:
        return max(Counter([0] * hub + [*spread.experts] * experts).values(), default=0)

    sent, hub_trained, experts_trained = 0, False, False
    for number, kind in enumerate(spread.schedule):
        hub_trained |= kind == EXPERTS_INTO_HUB
        experts_trained |= kind != EXPERTS_INTO_HUB
        sent += most(True, True)
        if number < len(spread.schedule) - 1:
            sent += most(hub_trained, experts_trained)
    return sent * spread.width * spread.state_bytes * spread.processes * (spread.processes - 1)


def fsdp_forward(weights: int, processes: int) -> int:
    """Of a forward under FSDP, whatever its tokens: every process gets what the others hold of all weights.

    Args:
        weights: Bytes of all models.
        processes: How many there are.
    """
    return (processes - 1) * weights


def fsdp_training(weights: int, trained: int, processes: int) -> int:
    """Of a training step: weights are gathered forward and backward, and gradients of the trained ones scattered.

    Args:
        weights: Bytes of all models.
        trained: Bytes of those weights that are trained.
        processes: How many there are.
    """
    return (processes - 1) * (2 * weights + trained)
