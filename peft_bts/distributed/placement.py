"""Which process runs which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

from ..stitch import HUB


class Placement:
    """Which of some processes runs the hub and each expert.

    Left to itself, the hub is on the first process, since it is loaded before anybody knows of experts; then every
    expert, the largest first, goes to the process that has least. Every process comes to the same result.

    Args:
        processes: How many there are.
        given: The process of each model by name, the hub's is `"hub"`; `None`: by size.

    Attributes:
        loads: What every process has so far, in weights.

    Raises:
        ValueError: If `given` names no hub, a process that is not there, or leaves one without a model.
    """

    def __init__(self, processes: int, given: Optional[Mapping[str, int]] = None) -> None:
        self.processes, self.given = processes, given
        self.loads = [0] * processes
        if given is None:
            return
        if HUB not in given:
            raise ValueError(f"placement says nothing of the hub; name its process, as in {{'hub': 0, ...}}: {given}.")
        for name, process in given.items():
            if isinstance(process, bool) or not isinstance(process, int) or not 0 <= process < processes:
                raise ValueError(
                    f"placement puts {name!r} on process {process!r}, expected a number from 0 to {processes - 1}: "
                    f"there are {processes} processes for one stitched model."
                )
        idle = sorted(set(range(processes)) - set(given.values()))
        if idle:
            raise ValueError(
                f"placement leaves process {', '.join(map(str, idle))} of {processes} without a model. Start fewer "
                "processes, or give each a model."
            )

    @property
    def hub(self) -> int:
        """The hub's process."""
        return 0 if self.given is None else self.given[HUB]

    def check_number(self, experts: int) -> None:
        """Raise `ValueError` if there are more processes than models.

        Args:
            experts: How many experts have weights of their own; a LoRA of the hub is where the hub is.
        """
        if self.given is None and self.processes > 1 + experts:
            raise ValueError(
                f"{self.processes} processes are too many for {1 + experts} models (the hub, and experts with weights "
                f"of their own): each model runs in one process. Start {1 + experts} or fewer, or add an axis over "
                "which the data are spread (`mesh`)."
            )

    def place(self, sizes: Mapping[str, int], with_hub: Sequence[str] = ()) -> dict[str, int]:
        """Choose the processes of experts; those that were placed before stay where they are.

        Args:
            sizes: Weights of each expert by name.
            with_hub: Names of those that share the hub's weights.

        Raises:
            ValueError: If a given placement says nothing of one, or parts one of `with_hub` from the hub.
        """
        chosen = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            if self.given is not None:
                if name not in self.given:
                    raise ValueError(f"placement says nothing of expert {name!r}; it has {sorted(self.given)}.")
                process = self.given[name]
                if name in with_hub and process != self.hub:
                    raise ValueError(
                        f"placement puts expert {name!r} on process {process}, but it is an adapter on the hub's own "
                        f"weights, which are on process {self.hub}. Put it there."
                    )
            elif name in with_hub:
                process = self.hub
            else:
                process = min(range(self.processes), key=lambda p: (self.loads[p], p))
            self.loads[process] += sizes[name]
            chosen[name] = process
        return chosen

    def take_away(self, process: int, size: int) -> None:
        """A process no longer has an expert of this size."""
        self.loads[process] -= size
