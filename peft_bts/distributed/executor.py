"""The executor of a stitched model over several processes: each runs its models, and all meet at the stitches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..forward.executor import Advance, Boundary, Executor, Mix
from ..forward.state import ForwardState, MakeExecutor, run_in_turn
from ..forward.stream import Checkpoint
from ..stitch import HUB, ExpertsIntoHub, HubIntoExperts, Stitch
from .checks import INPUTS, check_call, check_same_inputs
from .exchange import enter, linked, meet
from .parallel import ExpertParallel
from .processes import Processes


class DistributedExecutor:
    """Runs the models of this process by another executor, and exchanges states at the stitches.

    Args:
        inner: Has a stream for every expert; those of experts that other processes run do nothing.
        processes: The processes.
        owners: The process of every model of the composition, the hub's first, by name.
        last: The hub layer with the last stitch behind it.
        everywhere: Whether all processes compute every stitch, which gradients and observers need. Else a state goes
            to the processes that go on from it, and each computes its part of a stitch: nobody waits for what only
            others need.
        kind: What the dtypes of states depend on, beside the place of a stitch.
    """

    spread = True

    def __init__(
        self,
        inner: Executor,
        processes: Processes,
        owners: Mapping[str, int],
        last: Optional[int],
        everywhere: bool,
        kind: Hashable,
    ) -> None:
        self.inner, self._processes, self._owners = inner, processes, owners
        self._last, self._everywhere, self._kind = last, everywhere, (everywhere, kind)
        self._states: dict[Any, Tensor] = {}

    def run_hub(self, hub: Callable[[], Any]) -> Any:
        return self.inner.run_hub(hub)

    def look_ahead(self, boundary: Boundary) -> None:
        self.inner.look_ahead(boundary)

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        return self.inner.advance(boundary, checkpoint)

    def stitch(
        self, layer: int, stitch: Stitch, mix: Mix, hub_BTD: Tensor, advance: Advance
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        if self._everywhere:
            return self._stitch_everywhere(layer, stitch, mix, hub_BTD, advance)
        if isinstance(stitch, ExpertsIntoHub):
            return self._mix_experts(layer, stitch, hub_BTD, advance)
        return hub_BTD, self._into_experts(layer, stitch, hub_BTD, advance)

    def _stitch_everywhere(
        self, layer: int, stitch: Stitch, mix: Mix, hub_BTD: Tensor, advance: Advance
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        states = in_order(advance())
        given, owners = [hub_BTD, *states.values()], self._owners_of(states)
        absent = {
            key: tensor for key, tensor, owner in zip([HUB, *states], given, owners) if owner != self._processes.index
        }

        def link(tensor: Tensor, *inputs: Hashable) -> Tensor:
            """A tensor made of these inputs, of which some are from other processes."""
            return linked(tensor, [absent[key] for key in inputs if key in absent])

        met_BTD, *others = meet(self._processes, given, owners, (layer, tuple(states), self._kind))
        met = dict(zip(states, others))
        self._states = {key: link(state, key) for key, state in met.items()}
        hub_BTD, new_states = mix(met_BTD, met)
        if isinstance(stitch, ExpertsIntoHub):
            return link(hub_BTD, HUB, *states), {key: link(state, key) for key, state in new_states.items()}
        return link(hub_BTD, HUB), {key: link(state, key, HUB) for key, state in new_states.items()}

    def _mix_experts(
        self, layer: int, stitch: ExpertsIntoHub, hub_BTD: Tensor, advance: Advance
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Experts into hub: the experts' processes project, the hub's mixes; the last state goes to all of them.

        Returns the hub's new state, right in its own process, the last one in all; and the projected states of the
        experts that are here.
        """
        self._states = states = in_order(advance())
        processes, (hub, *owners) = self._processes, self._owners_of(states)
        mine = {
            name: stitch.projection(name, state.to(hub_BTD.device))
            for (name, state), owner in zip(states.items(), owners)
            if owner == processes.index
        }
        projected = [mine.get(name, hub_BTD) for name in states]  # those of others are as wide as the hub
        dtype, *dtypes = processes.agreed_dtypes(
            (layer, tuple(states), self._kind), [tensor.dtype for tensor in (hub_BTD, *projected)], [hub, *owners]
        )
        projected = processes.to_readers(projected, owners, dtypes, [[hub]] * len(owners))
        if processes.index == hub:
            hub_BTD = stitch.mix(hub_BTD, dict(zip(states, projected)))
        if layer == self._last:
            (hub_BTD,) = processes.to_readers([hub_BTD], [hub], [dtype], [range(processes.size)])
            processes.await_readers()
        return hub_BTD, {**states, **{name: p_BTD.to(states[name].dtype) for name, p_BTD in mine.items()}}

    def _into_experts(
        self, layer: int, stitch: HubIntoExperts, hub_BTD: Tensor, advance: Advance
    ) -> dict[Any, Tensor]:
        """Hub into experts: the hub's state goes to the experts' processes. Returns the states of those here."""
        processes, names = self._processes, sorted(self._owners.keys() - {HUB})
        hub, owners = self._owners[HUB], [self._owners[name] for name in names]
        (dtype,) = processes.agreed_dtypes((layer, tuple(names), self._kind), [hub_BTD.dtype], [hub])
        # Others wait for it: the hub's process sends it before it runs its own experts, and they ask behind theirs.
        states = {} if processes.index == hub else in_order(advance())
        (hub_BTD,) = processes.to_readers([hub_BTD], [hub], [dtype], [owners])
        self._states = states = states or in_order(advance())
        here = {name for name, owner in zip(names, owners) if owner == processes.index}
        mine = {name: state.to(hub_BTD.device) for name, state in states.items() if name in here}
        return {**states, **(stitch(hub_BTD, mine) if mine else {})}

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


def in_order(states: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """States by key, in an order that is the same in all processes, however they run the models."""
    return {key: states[key] for key in sorted(states)}


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
            composition = state.composition
            settings = {
                "active adapter": composition.adapter,
                "active experts": sorted(composition.experts),
                "limits for leaving out experts": state.policy,
            }
            inputs = {name: state.call.get(name) for name in INPUTS}
            check_same_inputs(processes, inputs, {"trace_gates": state.watches_stitches}, settings)
        inputs = state.call["inputs_embeds"] if state.call.get("input_ids") is None else state.call["input_ids"]
        device = inputs.device.type
        casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = state.composition.adapter, casts, inputs.dtype, self._dtype()
        owners = self._parallel.owners(state.composition)
        # Without stitches the hub's own last layer hands on its states, which others must not run in its place.
        make_inner = self._make_inner if state.composition.schedule else run_in_turn
        return DistributedExecutor(
            make_inner(state),
            processes,
            owners,
            last=max(state.composition.schedule, default=None),
            everywhere=torch.is_grad_enabled() or state.watches_stitches,
            kind=kind,
        )
