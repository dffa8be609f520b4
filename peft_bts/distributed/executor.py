"""The executor of a stitched model over several processes: each runs its models, and all meet at the stitches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..forward.executor import Boundary, Executor
from ..forward.state import ForwardState, MakeExecutor, run_in_turn
from ..forward.stream import Checkpoint
from ..stitch import HUB
from .checks import check_call, check_same_inputs
from .exchange import enter, meet
from .parallel import ExpertParallel
from .processes import Processes


class DistributedExecutor:
    """Runs the models of this process by another executor, and exchanges states at the stitches.

    Args:
        inner: Has a stream for every expert; those of experts that other processes run do nothing.
        processes: The processes.
        owners: The process of every model of the composition, the hub's first, by name.
        kind: What the dtypes of states depend on, beside the place of a stitch.
    """

    spread = True

    def __init__(self, inner: Executor, processes: Processes, owners: Mapping[str, int], kind: Hashable) -> None:
        self.inner, self._processes, self._owners, self._kind = inner, processes, owners, kind
        self._states: dict[Any, Tensor] = {}
        self._meetings = 0

    def run_hub(self, hub: Callable[[], Any]) -> Any:
        return self.inner.run_hub(hub)

    def look_ahead(self, boundary: Boundary) -> None:
        self.inner.look_ahead(boundary)

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        return self.inner.advance(boundary, checkpoint)

    def meet(self, hub_BTD: Tensor, states: dict[Any, Tensor]) -> tuple[Tensor, dict[Any, Tensor]]:
        states = {key: states[key] for key in sorted(states)}  # the same order in all processes, however they run them
        self._meetings += 1
        point = self._meetings, tuple(states), self._kind
        hub_BTD, *others = meet(self._processes, [hub_BTD, *states.values()], self._owners_of(states), point)
        self._states = dict(zip(states, others))
        return hub_BTD, dict(self._states)

    def replace_states(self, states: Mapping[Hashable, Tensor]) -> None:
        self._states = {key: states[key] for key in self._states}

    def go_on(self, hub_BTD: Tensor) -> Tensor:
        tensors = [hub_BTD, *self._states.values()]
        hub_BTD, *others = enter(self._processes, tensors, self._owners_of(self._states))
        self._states = dict(zip(self._states, others))
        self.inner.replace_states(self._states)
        return hub_BTD

    def share(self, names: Sequence[str], values: list[Tensor]) -> list[Tensor]:
        owners = [self._owners[name] for name in names[1:]]
        return values[:1] + meet(self._processes, values[1:], owners, ("outputs", tuple(names), self._kind))

    def agree(self, values: Tensor) -> Tensor:
        return self._processes.first_ones(values)

    def close(self) -> None:
        self.inner.close()

    def _owners_of(self, keys: Mapping[Any, Tensor]) -> list[int]:
        """Of the hub and the experts; a key is an expert's name, or starts with it (inference/dropping.py)."""
        return [self._owners[HUB], *(self._owners[key if isinstance(key, str) else key[0]] for key in keys)]


class Distributed:
    """Makes the executors of a model's forwards (a `MakeExecutor`), around those of another one.

    Args:
        make_inner: Makes what runs the models of this process.
        parallel: Who runs what.
        dtype: Says which dtype the hub's weights have now.
    """

    def __init__(
        self,
        make_inner: MakeExecutor,
        parallel: ExpertParallel,
        dtype: Callable[[], torch.dtype],
    ) -> None:
        self._make_inner, self._parallel, self._dtype = make_inner, parallel, dtype

    def __call__(self, state: ForwardState) -> Executor:
        check_call(state.call, state.cache, state.composition.hub_config)
        processes = self._parallel.processes
        if self._parallel.check_inputs:
            check_same_inputs(processes, state.call)
        inputs = state.call["inputs_embeds"] if state.call.get("input_ids") is None else state.call["input_ids"]
        device = inputs.device.type
        casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = state.composition.adapter, casts, inputs.dtype, self._dtype()
        owners = self._parallel.owners(state.composition)
        # Without stitches the hub's own last layer hands on its states, which others must not run in its place.
        make_inner = self._make_inner if state.composition.schedule else run_in_turn
        return DistributedExecutor(make_inner(state), processes, owners, kind)
