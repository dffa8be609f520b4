"""Experts that nobody listens to are left out while decoding, and called back when the gates ask for them.

Gates depend on the hub's state alone, so what an expert would be given is known whether it runs or not. Prompts are
read by all. After that, for every sequence by itself, experts with too little of the gates over the last few tokens
are skipped, and the softmax renormalises over the rest. Output gates decide, since they say who speaks, and without
them those of the last stitch. (Where outputs are mixed, the last stitch's gates say little: by them, the expert that
answers may be the first to go, see benchmarks/dropping.py.) A skipped expert loses nothing: what it has missed is kept
(`catching_up.py`), and when its gate opens again it runs over all of that at once. It then is where it would be, had
it listened all along.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..config import EXPERTS_INTO_HUB
from ..forward.cache import cached_tokens, expert_caches, held_expert_caches, is_plain
from ..forward.composition import Composition
from ..forward.masks import is_text
from ..forward.state import FinalStates, ForwardState, Lane
from ..forward.stream import Stream
from ..forward.thread_local import ThreadLocal, Transient
from ..mixture import OutputMixture
from ..stitch import HUB, Stitch
from .catching_up import CatchUpCache, CatchUpState, MissedForward, RowGroup


_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Dropping:
    """The rule by which a sequence keeps experts.

    Args:
        max_active_experts: At most so many, those with the largest gates; 0 leaves the hub alone.
        expert_threshold: Only those with a mean gate of at least this, from 0 to 1.

    Raises:
        ValueError: For values out of range, or if neither is given.
    """

    max_active_experts: Optional[int] = None
    expert_threshold: Optional[float] = None

    def __post_init__(self) -> None:
        most, least = self.max_active_experts, self.expert_threshold
        if most is None and least is None:
            raise ValueError("Dropping experts needs `max_active_experts` or `expert_threshold`.")
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 0):
            raise ValueError(f"max_active_experts must be an integer of at least 0, got {most!r}.")
        if least is not None and not (isinstance(least, (int, float)) and 0 <= least <= 1):
            raise ValueError(f"expert_threshold must be a gate, from 0 to 1, got {least!r}.")

    def choose(self, gates_BN: Tensor) -> Tensor:
        """Return which experts to run, (B, N) and boolean, by the mean gate of each (the hub's is not among them)."""
        keep = torch.ones_like(gates_BN, dtype=torch.bool)
        if self.max_active_experts is not None:
            places = gates_BN.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep = places < self.max_active_experts
        return keep if self.expert_threshold is None else keep & (gates_BN >= self.expert_threshold)


class DroppingPolicies(Transient):
    """The policies that are on, one for each thread; makes the states of a model's forwards accordingly."""

    def __init__(self) -> None:
        self._policy: ThreadLocal[Dropping] = ThreadLocal()
        self._lock = threading.Lock()
        self._number = 0  # how many are on, in any thread: compiled code can see this

    @property
    def current(self) -> Optional[Dropping]:
        """The policy that is on in this thread."""
        return self._policy.get()

    @contextmanager
    def on(self, policy: Dropping) -> Iterator[None]:
        """Have this thread's forwards leave out experts by `policy`."""
        before = self.current
        with self._lock:
            self._number += 1
        self._policy.set(policy)
        try:
            yield
        finally:
            self._policy.set(before)
            with self._lock:
                self._number -= 1

    def make_state(
        self, composition: Composition, call: dict[str, Any], cache: Optional[Cache], *args: Any
    ) -> ForwardState:
        """The state of a forward: one that can do without experts, if that is asked for or was for its cache."""
        if self._number and torch.compiler.is_compiling():
            return self._make_uncompiled(composition, call, cache, *args)
        return self._make(composition, call, cache, *args)

    def _make(
        self, composition: Composition, call: dict[str, Any], cache: Optional[Cache], *args: Any
    ) -> ForwardState:
        held = held_expert_caches(cache)
        if self.current is None and (held is None or held.catch_up is None):
            return ForwardState(composition, call, cache, *args)
        return DroppingForwardState(self.current, composition, call, cache, *args)

    @torch.compiler.disable(reason="drop_experts() chooses experts by numbers: what it runs cannot be one graph")
    def _make_uncompiled(self, *args: Any) -> ForwardState:
        return self._make(*args)


class DroppingForwardState(ForwardState):
    """A forward in which an expert runs for some sequences only, or for none (see the top of this file).

    A stream belongs to a group of an expert, `(name, number)`, and has the tokens that this group has missed in front
    of the new ones. Hub-into-Experts stitches tell it what the hub was when those came; Experts-into-Hub stitches
    look at its new tokens alone.
    """

    policy: Optional[Dropping]

    def __init__(self, policy: Optional[Dropping], *args: Any) -> None:
        super().__init__(*args)
        self.policy = policy
        self.past = cached_tokens(self.cache)
        self.catch_up: Optional[CatchUpState] = None  # stays so without a cache: nothing will be decoded
        self.new = 0  # how many tokens are new
        self.running: dict[tuple[str, int], RowGroup] = {}  # the groups that have a stream
        self.present: dict[str, Tensor] = {}  # which sequences every expert takes part in, (B,) and boolean

    def check(self) -> None:
        if self.composition.forgetting is not None:
            raise ValueError(
                "Experts cannot be left out where output gates go by evidence: an expert that does not run tells "
                "nothing. Run all experts, or leave some out of whole texts (`set_active_experts`)."
            )
        cache, mask, places = (self.call.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        if self.past is None:
            raise ValueError("Experts cannot be dropped beside a hub whose cache does not count its tokens.")
        if cache is not None and (type(cache) not in (DynamicCache, CatchUpCache) or cache.offloading):
            kind = "an offloaded one" if type(cache) is DynamicCache else f"a {type(cache).__name__}"
            raise ValueError(f"Experts can be dropped with a plain DynamicCache only, and this is {kind}.")
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError("Experts can be dropped with 2D attention masks only, or none: one entry per token.")
        if places is not None and places.dim() != 2:
            raise ValueError(f"Experts can be dropped with 2D position_ids only, got {places.dim()} dimensions.")
        held = held_expert_caches(self.cache)
        if held is not None and held.catch_up is not None and held.catch_up.missed:
            self._check_goes_on(held.catch_up)
        super().check()

    def _check_goes_on(self, catch_up: CatchUpState) -> None:
        if catch_up.adapter != self.composition.adapter:
            raise ValueError(
                f"Experts have yet to make up for what they missed under the adapter {catch_up.adapter!r}, and now "
                f"{self.composition.adapter!r} is active. Start with an empty cache."
            )
        as_embeds = self.call.get("input_ids") is None
        if any(("input_ids" not in call.tokens) != as_embeds for call in catch_up.missed):
            now, before = ("inputs_embeds", "input_ids") if as_embeds else ("input_ids", "inputs_embeds")
            raise ValueError(
                f"Experts have yet to make up for tokens that came as {before}; go on with them, not {now}."
            )

    def _expert_caches(self) -> dict[str, Cache]:
        if self.cache is None:
            return {}
        held = expert_caches(self.cache, self.composition.hub_layers, self.composition.experts)
        if held.catch_up is None:
            assert self.past is not None  # as `check` has made sure
            tokens = self.call["inputs_embeds"] if self.call.get("input_ids") is None else self.call["input_ids"]
            held.catch_up = CatchUpState(held.by_name, self.composition.adapter, len(tokens), self.past)
            held.by_name = {}  # groups are split and joined anew: nobody shall hold on to the old caches
            self.cache.__class__ = CatchUpCache
        self.catch_up = held.catch_up
        return {}

    def lanes(self, names: Sequence[str]) -> dict[Hashable, Lane]:
        if self.catch_up is None:
            return super().lanes(names)
        self._choose(self.catch_up)
        batch = torch.arange(len(next(iter(self.present.values()))))
        return {
            key: Lane(key[0], None if torch.equal(group.rows, batch) else group.rows, group.cache)
            for key, group in self.running.items()
            if key[0] in names and is_plain(group.cache) and len(self.catch_up.since(group)) == 1
        }

    @property
    def watches_stitches(self) -> bool:
        return self.catch_up is not None or super().watches_stitches

    def begin_streams(self, without: Collection[Hashable] = ()) -> dict[Hashable, Stream]:
        if self.catch_up is None:
            return super().begin_streams(without)
        self._choose(self.catch_up)
        streams: dict[Hashable, Stream] = {}
        for key, group in self.running.items():
            if key not in without:
                call = self._call_for(group, self.catch_up.since(group))
                streams[key] = self.composition.experts[key[0]](call, group.cache, self.composition.hub_config)
        return streams

    def _choose(self, catch_up: CatchUpState) -> None:
        """Choose the groups that run; once in a forward."""
        if self.new:
            return
        tokens = {
            name: value.detach().clone()
            for name in _PER_TOKEN
            if isinstance(value := self.call.get(name), Tensor) and value.dim() > 1
        }
        given = tokens["input_ids"] if "input_ids" in tokens else tokens["inputs_embeds"]
        self.new = given.shape[1]
        catch_up.adapter = self.composition.adapter
        wanted = self._wanted(catch_up)
        catch_up.missed.append(MissedForward(catch_up.seen, tokens, {}))
        catch_up.seen += self.new
        for name in catch_up.names:
            groups = [part for group in catch_up.groups[name] for part in group.split(wanted[name])]
            catch_up.groups[name] = groups
            self.present[name] = wanted[name].to(given.device)
            for number, group in enumerate(groups):
                # Others than plain caches (recurrent states) cannot make up for what they missed: they run on unheard.
                if wanted[name][group.rows].any() or not is_plain(group.cache):
                    self.running[name, number] = group

    def _wanted(self, catch_up: CatchUpState) -> dict[str, Tensor]:
        """Which sequences every expert is to run for, (B,) and boolean by name. Prompts are for all."""
        gates = catch_up.mean_gates()
        if self.policy is None or gates is None or self.new > 1:
            return {name: torch.ones(catch_up.batch, dtype=torch.bool) for name in catch_up.names}
        return dict(zip(catch_up.names, self.policy.choose(gates).unbind(dim=1)))

    def _call_for(self, group: RowGroup, calls: list[MissedForward]) -> dict[str, Any]:
        """The hub's call as this group is to see it: its rows, with all it has missed; `calls` ends with this one."""
        rows = group.rows
        if len(calls) == 1:
            tokens = [{name: self.call[name] for name in calls[0].tokens}]  # with their gradients
        elif any("position_ids" in call.tokens for call in calls):
            tokens = [call.with_places() for call in calls]
        else:
            tokens = [call.tokens for call in calls]
        new = dict.fromkeys(tokens[-1])
        for name in set.intersection(*map(set, tokens)):
            parts = [by_name[name] for by_name in tokens]
            value = torch.cat([_expanded(part, max(map(len, parts))) for part in parts], dim=1)
            new[name] = value if len(value) == 1 else value[rows.to(value.device)]
        mask = self.call.get("attention_mask")
        if isinstance(mask, Tensor):
            new["attention_mask"] = mask[rows.to(mask.device)]
        return {**self.call, **new}

    def _mix(
        self, layer: int, stitch: Stitch, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        if self.catch_up is None:
            return super()._mix(layer, stitch, hub_BTD, states)
        if stitch.kind != EXPERTS_INTO_HUB:
            return hub_BTD, self._into_experts(self.catch_up, layer, stitch, hub_BTD, states)
        observe = None if self.observation is None else partial(self.observation.note_gates, layer)
        given = self._of_all_rows(states, hub_BTD.device)
        if layer == self.composition.hub_layers - 1 and not self.composition.mixture:
            gates_BTMD = stitch.gates(hub_BTD.to(next(stitch.parameters()).dtype), self.catch_up.names)
            self._note_recent(self.catch_up, gates_BTMD.mean(dim=-1)[..., 1:])
        present = {name: self.present[name] for name in given}
        new_hub_BTD, _ = stitch(hub_BTD, given, observe, present)
        if not self.composition.projected:
            return new_hub_BTD, states
        return new_hub_BTD, {key: stitch.project(key[0], state.to(hub_BTD.device)) for key, state in states.items()}

    def _of_all_rows(self, states: dict[Any, Tensor], device: Optional[torch.device] = None) -> dict[str, Tensor]:
        """States of the new tokens by expert that ran for some sequence, (B, T, D_i); zero for the others."""
        batch = len(next(iter(self.present.values())))
        given: dict[str, Tensor] = {}
        for (name, number), state in states.items():
            where = state.device if device is None else device
            if name not in given:
                given[name] = state.new_zeros(batch, self.new, state.shape[-1], device=where)
            given[name][self.running[name, number].rows.to(where)] = state[:, -self.new :].to(where)
        return given

    def _note_recent(self, catch_up: CatchUpState, gates_BTN: Tensor) -> None:
        """Remember the experts' gates, for the choice at the next token."""
        assert self.past is not None  # as `check` has made sure
        text_BT = is_text(self.call.get("attention_mask"), self.composition.hub_config, self.past, self.new)
        catch_up.note(self.executor.agree(gates_BTN), text_BT)

    def _into_experts(
        self, catch_up: CatchUpState, layer: int, stitch: Stitch, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> dict[Any, Tensor]:
        catch_up.missed[-1].hub[layer] = hub_BTD.detach()
        new_states = {}
        for key, state in states.items():
            group, name = self.running[key], key[0]
            rows = group.rows.to(hub_BTD.device)
            missed = [call.hub[layer][rows] for call in catch_up.since(group)[:-1]]
            hub = torch.cat([*missed, hub_BTD[rows]], dim=1)
            observe = None
            if self.observation is not None:
                noted = self.observation.gates.setdefault(layer, {})
                observe = partial(self._note_rows, noted, rows, len(hub_BTD))
            new_states[key] = stitch(hub, {name: state.to(hub.device)}, observe)[name]
        return new_states

    def _note_rows(self, noted: dict[str, Tensor], rows: Tensor, batch: int, gates: dict[str, Tensor]) -> None:
        for name, gate in gates.items():
            mean = gate[:, -self.new :].detach().float().mean(dim=-1)
            noted.setdefault(name, mean.new_zeros(batch, self.new))[rows] = mean

    def final_states(self) -> FinalStates:
        if self.catch_up is None:
            return super().final_states()
        last = self.composition.boundary(self.composition.hub_layers - 1)
        return FinalStates(self._of_all_rows(self.executor.advance(last)), self.present)

    def see_output(self, hub_BTD: Tensor, mixture: OutputMixture) -> None:
        if self.catch_up is not None:
            log_gates_BTM = mixture.log_gates(hub_BTD, self.catch_up.names)
            self._note_recent(self.catch_up, log_gates_BTM.exp()[..., 1:])

    def finish(self) -> None:
        if self.catch_up is not None:
            self.catch_up.close(list(self.running.values()))
            if self.observation is not None:
                observed, places = self.observation.gates, [*self.composition.schedule]
                places += [self.composition.hub_layers] if self.composition.mixture else []
                closed = torch.zeros_like(observed[places[-1]][HUB])
                for place in places:
                    gates = observed.setdefault(place, {})
                    gates.update({name: closed for name in self.catch_up.names if name not in gates})
        super().finish()


def _expanded(value: Tensor, batch: int) -> Tensor:
    return value.expand(batch, *value.shape[1:])
