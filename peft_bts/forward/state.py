"""The state of one forward: the hub's call, the experts' streams, and what happens at a stitch.

The hub runs its own loop over its own layers; it must not know that it has company. What the stitches need to know of
the forward under way is in a `ForwardState`, which lives from the hub's backbone being called until it returns
(hooks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

from torch import Tensor
from transformers import Cache

from ..config import EXPERTS_INTO_HUB
from ..mixture import OutputMixture
from ..stitch import HUB, Stitch
from .cache import check_cache, expert_caches, held_expert_caches
from .composition import Composition
from .executor import Executor, SequentialExecutor
from .masks import check_mask
from .observers import Observation
from .stream import Checkpoint, Stream


class FinalStates(NamedTuple):
    """Experts' hidden states behind their last layers.

    Attributes:
        by_name: (B, T, D_i) each.
        present: Which sequences each expert takes part in, (B,) and boolean; `None`: all.
    """

    by_name: dict[str, Tensor]
    present: Optional[dict[str, Tensor]] = None


class Lane(NamedTuple):
    """Sequences for which an expert runs over the tokens of a call, and over no others.

    Attributes:
        name: The expert's.
        rows: Which sequences of the batch, (R,) in the expert's order; `None`: all of them in theirs.
        cache: The expert's, of these sequences; `None` without one.
    """

    name: str
    rows: Optional[Tensor]
    cache: Optional[Cache]


class ForwardState:
    """The state of one forward.

    Args:
        composition: What the active adapter runs.
        call: The arguments of the hub's backbone, by name.
        cache: The hub's cache; `None` if the forward runs without one.
        make_executor: Makes what runs the experts' streams.
        observation: Takes the gates in; `None` while nobody observes.

    Attributes:
        policy: By which experts are left out, in a subclass that does so; it can be compared.
    """

    policy: Optional[Hashable] = None

    def __init__(
        self,
        composition: Composition,
        call: dict[str, Any],
        cache: Optional[Cache],
        make_executor: Callable[[ForwardState], Executor],
        observation: Optional[Observation] = None,
    ) -> None:
        self.composition, self.call, self.cache = composition, call, cache
        self.observation = observation
        self._make_executor = make_executor
        self.caches: Mapping[str, Cache] = {}  # the experts' own, by name
        self.executor: Executor = SequentialExecutor({})  # until the experts have begun

    def check(self) -> None:
        """Raise `ValueError` for inputs that the experts cannot take, before anything is computed."""
        check_call(self.composition, self.call)
        if self.cache is not None:
            check_cache(self.cache, self.composition.experts, self.composition.forgetting)

    def start(self) -> None:
        """Begin the experts' forwards: they have embedded their inputs, and know what their layers are called with."""
        self.caches = self._expert_caches()
        held = held_expert_caches(self.cache)
        if held is not None and self.composition.forgetting is None:
            held.memory = None  # of these tokens there will be no evidence
        self.executor = self._make_executor(self)
        first = self.composition.next_stitch(-1)
        last_layer = self.composition.hub_layers - 1
        self.executor.look_ahead(self.composition.boundary(last_layer if first is None else first))

    def _expert_caches(self) -> Mapping[str, Cache]:
        """The experts' own caches, by name; none without a cache of the hub's."""
        if self.cache is None:
            return {}
        held = expert_caches(self.cache, self.composition.hub_layers, self.composition.experts)
        return held.by_name

    def lanes(self, names: Sequence[str]) -> dict[Hashable, Lane]:
        """What an executor may run of the named experts together with the hub, by key of the stream in its place."""
        return {name: Lane(name, None, self.caches.get(name)) for name in names}

    @property
    def watches_stitches(self) -> bool:
        """Whether all states and gates of a stitch are wanted, and not only what the models go on from."""
        return self.observation is not None

    def begin_streams(self, without: Collection[Hashable] = ()) -> dict[Hashable, Stream]:
        """Begin the experts' forwards; executors call this.

        Args:
            without: Keys of streams that the executor runs by itself, some of `lanes`.

        Returns:
            Streams by key, which is the expert's name, unless a subclass says otherwise.
        """
        experts = self.composition.experts
        return {
            name: experts[name](self.call, self.caches.get(name), self.composition.hub_config)
            for name in sorted(set(experts).difference(without))
        }

    def apply_stitch(self, layer: int, stitch: Stitch, hub_BTD: Tensor, checkpoint: Optional[Checkpoint]) -> Tensor:
        """Bring every expert up to the stitch behind a hub layer, apply it, and return the hub's new state.

        Args:
            layer: 0-based hub layer that has just run.
            stitch: The stitch.
            hub_BTD: The hub layer's hidden states.
            checkpoint: The hub's gradient checkpointing function while it is in use, else `None`.
        """
        following = self.composition.next_stitch(layer)
        changes_experts = stitch.kind != EXPERTS_INTO_HUB or self.composition.projected

        def advance() -> dict[Any, Tensor]:
            states = {**self.executor.advance(self.composition.boundary(layer), checkpoint)}
            if following is not None and not changes_experts:
                self.executor.look_ahead(self.composition.boundary(following))
            return states

        hub_BTD, new_states = self.executor.stitch(layer, stitch, partial(self._mix, layer, stitch), hub_BTD, advance)
        if changes_experts:
            self.executor.replace_states(new_states)
        if following is not None or self.composition.mixture:  # else nobody goes on
            hub_BTD = self.executor.go_on(hub_BTD)
            if following is not None and changes_experts:
                self.executor.look_ahead(self.composition.boundary(following))
        if following is None and not self.composition.mixture:
            self.finish()
        return hub_BTD

    def _mix(
        self, layer: int, stitch: Stitch, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Apply the stitch behind a hub layer: the hub's and the experts' new states."""
        states = {name: state.to(hub_BTD.device) for name, state in states.items()}
        observe = None if self.observation is None else partial(self.observation.note_gates, layer)
        if stitch.kind == EXPERTS_INTO_HUB:
            return stitch(hub_BTD, states, observe)
        return hub_BTD, stitch(hub_BTD, states, observe)

    def final_states(self) -> FinalStates:
        """The experts' hidden states behind their last layers, for the output mixture."""
        last = self.composition.boundary(self.composition.hub_layers - 1)
        return FinalStates({str(name): state for name, state in self.executor.advance(last).items()})

    def see_output(self, hub_BTD: Tensor, mixture: OutputMixture) -> None:
        """Take note of what the hub's head reads, (B, T, D), and of the gates that go by it."""

    def note_output_gates(self, names: Sequence[str], log_gates_BTM: Tensor) -> None:
        """Take in the gates of the output mixture: the hub's, then those of the named experts."""
        if self.observation is not None:
            gates = log_gates_BTM.exp()[..., None].unbind(dim=-2)
            self.observation.note_gates(self.composition.hub_layers, dict(zip([HUB, *names], gates)))

    def finish(self) -> None:
        """All gates are known."""
        if self.observation is not None:
            self.observation.finish()

    def close(self) -> None:
        """The hub's backbone has returned, or failed."""
        self.executor.close()


# Makes the executor of a forward. It has `state.begin_streams()` begin the streams that it wants to run.
MakeExecutor = Callable[[ForwardState], Executor]


def run_in_turn(state: ForwardState) -> SequentialExecutor:
    """Make the executor that runs the streams one after the other (a `MakeExecutor`)."""
    return SequentialExecutor(state.begin_streams())


def check_call(composition: Composition, call: dict[str, Any]) -> None:
    """Raise `ValueError` for arguments of the hub's backbone that the experts cannot take."""
    if not composition.experts:
        raise ValueError(
            "No expert is attached, so there is nothing to stitch. Call `model.attach_expert(name, model)`, or name "
            "the experts in StitchConfig(experts=...)."
        )
    embeds = call.get("inputs_embeds")
    if embeds is None and call.get("input_ids") is None:
        raise ValueError("Neither input_ids nor inputs_embeds were given; pass one of them.")
    if composition.forgetting is not None and call.get("input_ids") is None:
        raise ValueError(
            "The output gates go by evidence, how well each model predicts the tokens, and inputs_embeds do not say "
            "which tokens they are. Pass `input_ids`."
        )
    for name, expert in composition.experts.items():
        check_mask(call.get("attention_mask"), composition.hub_config, expert.config, name)
        if embeds is not None and call.get("input_ids") is None and expert.embedding_width != embeds.shape[-1]:
            raise ValueError(
                f"inputs_embeds has width {embeds.shape[-1]}, but expert {name!r} embeds tokens in "
                f"{expert.embedding_width} channels. Pass `input_ids`, so that every model can embed them itself."
            )
