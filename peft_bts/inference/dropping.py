"""Experts that nobody listens to are left out while decoding, and called back when the gates ask for them.

The gates of a stitch depend on the hub's state alone, so what an expert would be given is known whether it runs or
not. Prompts are read by all. After that, for every sequence by itself, experts with too little of the last stitch's
gates over the last few tokens are skipped, and the softmax renormalises over the rest. A skipped expert loses
nothing: what it has missed, its tokens and what the hub would have told it, is kept, and when its gate opens again it
runs over all of that at once. It then is where it would be, had it listened all along.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..config import EXPERTS_INTO_HUB
from ..forward.cache import ROSTER, is_plain, join_caches
from ..forward.expert import Stream, cached_tokens
from ..forward.masks import is_text
from ..forward.state import Plan, Run
from ..stitch import HUB


# Over how many tokens gates are averaged. Measured (benchmarks/dropping.py): one token is not enough to tell what
# comes next, sixteen notice a change of domain too late, and the prompt as a whole misses it.
RECENT = 4


@dataclass(frozen=True)
class Dropping:
    """Which experts a sequence keeps.

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
        """Which experts to run, (B, N) and boolean, by the mean gate of each (the hub's is not among them)."""
        keep = torch.ones_like(gates_BN, dtype=torch.bool)
        if self.max_active_experts is not None:
            places = gates_BN.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep = places < self.max_active_experts
        return keep if self.expert_threshold is None else keep & (gates_BN >= self.expert_threshold)


@dataclass
class Group:
    """Sequences for which an expert has seen equally much."""

    rows: Tensor  # which sequences of the batch, (R,)
    cache: Cache  # the expert's, of these rows
    done: int  # how many tokens it holds

    def split(self, wanted: Tensor) -> list[Group]:
        """Groups of the rows that `wanted` (B,) marks, and of the others; one group where that cannot be done."""
        mine = wanted[self.rows]
        if mine.all() or not mine.any() or not is_plain(self.cache):
            return [self]
        return [Group(self.rows[part], _rows_of(self.cache, part), self.done) for part in (mine, ~mine)]


@dataclass
class Call:
    """One forward: what an expert that took no part in it needs to make up for it. Callers may reuse their tensors."""

    start: int  # tokens that the hub's cache held before
    tokens: dict[str, Tensor]  # arguments of the hub's backbone with an entry per token, (B or 1, T, ...)
    hub: dict[int, Tensor]  # the hub's states at its Hub-into-Experts stitches, (B, T, D) by layer

    def with_places(self) -> dict[str, Tensor]:
        """The tokens with their positions, which a backbone that is given none counts from the first of the cache."""
        given = next(iter(self.tokens.values()))
        places = torch.arange(self.start, self.start + given.shape[1], device=given.device)
        return {"position_ids": places[None], **self.tokens}


_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


class Roster:
    """Who has seen what of the sequences in a cache. Belongs to the cache.

    Attributes:
        seen: Tokens of a sequence so far.
        groups: By expert.
        missed: Forwards that some group has not seen yet, the oldest first.
        recent: Gates of the experts, (B, up to RECENT, N), in the order of `names`; NaN for padding.
        adapter: Whose stitches the sequences were continued with.
    """

    def __init__(self, cache: Cache, joined: dict[str, Cache], plan: Plan, batch: int, seen: int) -> None:
        self.names, self.adapter = sorted(joined), plan.adapter
        self.seen = seen
        every = torch.arange(batch)
        self.groups = {name: [Group(every, joined[name], self.seen)] for name in self.names}
        joined.update(dict.fromkeys(joined))  # groups are split and joined anew: nobody shall hold on to the old ones
        self.missed: list[Call] = []
        self.recent: Optional[Tensor] = None
        # Groups come and go, so their layers cannot stay among the hub's: what is done to all layers would miss them.
        del cache.layers[plan.hub_layers :]
        for change in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"):
            setattr(cache, change, partial(_refuse, change))
        setattr(cache, ROSTER, self)

    def choose(self, policy: Optional[Dropping], new_tokens: int) -> dict[str, Tensor]:
        """Which sequences every expert is to run for, (B,) and boolean by name. Prompts are for all."""
        batch = sum(len(group.rows) for group in self.groups[self.names[0]])
        if policy is None or self.recent is None or new_tokens > 1:
            return {name: torch.ones(batch, dtype=torch.bool) for name in self.names}
        return dict(zip(self.names, policy.choose(self.recent.nanmean(dim=1).nan_to_num()).unbind(dim=1)))

    def note(self, gates_BTN: Tensor, text_BT: Optional[Tensor]) -> None:
        """Remember the gates of new tokens, of which some may be padding."""
        if text_BT is not None:
            gates_BTN = gates_BTN.masked_fill(~text_BT.to(gates_BTN.device)[..., None], torch.nan)
        gates_BTN = gates_BTN[:, -RECENT:].detach().float().cpu()
        before = () if self.recent is None else (self.recent,)
        self.recent = torch.cat([*before, gates_BTN], dim=1)[:, -RECENT:]

    def close(self, ran: list[Group]) -> None:
        """After a forward: groups that are level again become one, and what all have seen is forgotten."""
        for group in ran:
            group.done = self.seen
        for name, groups in self.groups.items():
            level = [group for group in groups if group.done == self.seen]
            if len(level) > 1 and all(is_plain(group.cache) for group in level):
                behind = [group for group in groups if group.done < self.seen]
                rows = torch.cat([group.rows for group in level])
                joined = Group(rows, _joined_rows([group.cache for group in level]), self.seen)
                self.groups[name] = [joined, *behind]
        least = min(group.done for groups in self.groups.values() for group in groups)
        self.missed = [call for call in self.missed if call.start >= least]


def new_run(policy: Optional[Dropping], plan: Optional[Plan], call: dict[str, Any], *args: Any) -> Run:
    """The `Run` for a call: one that can do without experts, if that is asked for or was for the call's cache."""
    if plan is None or (policy is None and not hasattr(call.get("past_key_values"), ROSTER)):
        return Run(plan, call, *args)
    return DroppingRun(policy, plan, call, *args)


class DroppingRun(Run):
    """A forward in which an expert runs for some sequences only, or for none (see the top of this file).

    A stream belongs to a group of an expert, `(name, place)`, and has the tokens that this group has missed in front
    of the new ones. Hub-into-Experts stitches tell it what the hub was when those came; Experts-into-Hub stitches
    look at its new tokens alone.
    """

    def __init__(self, policy: Optional[Dropping], *args: Any) -> None:
        super().__init__(*args)
        self.policy = policy
        self.past = cached_tokens(self.call.get("past_key_values"))

    def check(self) -> None:
        cache, mask, places = (self.call.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        if self.past is None:
            raise ValueError("Experts cannot be dropped beside a hub whose cache does not count its tokens.")
        if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
            kind = "an offloaded one" if type(cache) is DynamicCache else f"a {type(cache).__name__}"
            raise ValueError(f"Experts can be dropped with a plain DynamicCache only, and this is {kind}.")
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError("Experts can be dropped with 2D attention masks only, or none: one entry per token.")
        if places is not None and places.dim() != 2:
            raise ValueError(f"Experts can be dropped with 2D position_ids only, got {places.dim()} dimensions.")
        roster = getattr(cache, ROSTER, None)
        if roster is not None and roster.missed:
            self._check_goes_on(roster)
        super().check()

    def _check_goes_on(self, roster: Roster) -> None:
        if roster.adapter != self.plan.adapter:
            raise ValueError(
                f"Experts have yet to make up for what they missed under the adapter {roster.adapter!r}, and now "
                f"{self.plan.adapter!r} is active. Start with an empty cache."
            )
        as_embeds = self.call.get("input_ids") is None
        if any(("input_ids" not in call.tokens) != as_embeds for call in roster.missed):
            now, before = ("inputs_embeds", "input_ids") if as_embeds else ("input_ids", "inputs_embeds")
            raise ValueError(
                f"Experts have yet to make up for tokens that came as {before}; go on with them, not {now}."
            )

    def _start(self, cache: Optional[Cache]) -> dict[Any, Stream]:
        self.roster = None
        if cache is None:
            return super()._start(cache)  # nothing will be decoded
        tokens = {
            name: value.detach().clone()
            for name in _PER_TOKEN
            if isinstance(value := self.call.get(name), Tensor) and value.dim() > 1
        }
        given = tokens.get("input_ids", tokens.get("inputs_embeds"))
        batch, self.new = given.shape[:2]
        self.roster = getattr(cache, ROSTER, None)
        if self.roster is None:
            joined = join_caches(cache, self.plan.hub_layers, self.plan.experts)
            self.roster = Roster(cache, joined, self.plan, batch, self.past)
        roster = self.roster
        roster.adapter = self.plan.adapter
        wanted = roster.choose(self.policy, self.new)
        roster.missed.append(Call(roster.seen, tokens, {}))
        roster.seen += self.new
        streams, self.running, self.present = {}, {}, {}
        for name in roster.names:
            groups = [part for group in roster.groups[name] for part in group.split(wanted[name])]
            roster.groups[name] = groups
            self.present[name] = wanted[name].to(given.device)
            for place, group in enumerate(groups):
                # Others than plain caches (recurrent states) cannot make up for what they missed: they run on unheard.
                if wanted[name][group.rows].any() or not is_plain(group.cache):
                    key = (name, place)
                    self.running[key] = group
                    streams[key] = self.plan.experts[name](self._call_for(group), group.cache, self.plan.hub_config)
        return streams

    def _since(self, group: Group) -> list[Call]:
        return [call for call in self.roster.missed if call.start >= group.done]

    def _call_for(self, group: Group) -> dict[str, Any]:
        """The hub's call as this group is to see it: its rows, with all it has missed."""
        calls, rows = self._since(group), group.rows
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

    def _apply(
        self, layer: int, stitch: nn.Module, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        if self.roster is None:
            return super()._apply(layer, stitch, hub_BTD, states)
        if stitch.kind != EXPERTS_INTO_HUB:
            return hub_BTD, self._into_experts(layer, stitch, hub_BTD, states)
        observe = partial(self._note_gates, layer) if self.observers else None
        given = {}
        for (name, place), state in states.items():
            rows = self.running[name, place].rows.to(hub_BTD.device)
            if name not in given:
                given[name] = state.new_zeros(len(hub_BTD), self.new, state.shape[-1], device=hub_BTD.device)
            given[name][rows] = state[:, -self.new :].to(hub_BTD.device)
        if layer == self.plan.hub_layers - 1:
            gates_BTMD = stitch.gates(hub_BTD.to(next(stitch.parameters()).dtype), self.roster.names)
            text_BT = is_text(self.call.get("attention_mask"), self.plan.hub_config, self.past, self.new)
            self.roster.note(gates_BTMD.mean(dim=-1)[..., 1:], text_BT)
        present = {name: self.present[name] for name in given}
        new_hub_BTD, _ = stitch(hub_BTD, given, observe, present)
        if not self.plan.projected:
            return new_hub_BTD, states
        return new_hub_BTD, {key: stitch.project(key[0], state.to(hub_BTD.device)) for key, state in states.items()}

    def _into_experts(
        self, layer: int, stitch: nn.Module, hub_BTD: Tensor, states: dict[Any, Tensor]
    ) -> dict[Any, Tensor]:
        self.roster.missed[-1].hub[layer] = hub_BTD.detach()
        new_states = {}
        for key, state in states.items():
            group, name = self.running[key], key[0]
            rows = group.rows.to(hub_BTD.device)
            missed = [call.hub[layer][rows] for call in self._since(group)[:-1]]
            hub = torch.cat([*missed, hub_BTD[rows]], dim=1)
            observe = partial(self._note_rows, layer, rows, len(hub_BTD)) if self.observers else None
            new_states[key] = stitch(hub, {name: state.to(hub.device)}, observe)[name]
        return new_states

    def _note_rows(self, layer: int, rows: Tensor, batch: int, gates: dict[str, Tensor]) -> None:
        for name, gate in gates.items():
            mean = gate[:, -self.new :].detach().float().mean(dim=-1)
            noted = self.gates.setdefault(layer, {}).setdefault(name, mean.new_zeros(batch, self.new))
            noted[rows] = mean

    def _end(self) -> None:
        if self.roster is not None:
            self.roster.close(list(self.running.values()))
            if self.observers:
                closed = torch.zeros_like(self.gates[self.plan.hub_layers - 1][HUB])
                for layer in self.plan.schedule:
                    gates = self.gates.setdefault(layer, {})
                    gates.update({name: closed for name in self.roster.names if name not in gates})
        super()._end()


def _refuse(change: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"{change}() on a cache that was filled while experts could be left out: its sequences can only be continued. "
        "Beam search, drafts and the like need a cache that was filled without `drop_experts`."
    )


def _with_layers(cache: Cache, layers: list[Any]) -> Cache:
    new = copy.copy(cache)
    new.layers = layers
    return new


def _rows_of(cache: Cache, rows: Tensor) -> Cache:
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.batch_select_indices(rows)
    return _with_layers(cache, layers)


def _joined_rows(caches: list[Cache]) -> Cache:
    layers = []
    for parts in zip(*(cache.layers for cache in caches)):
        layer = copy.copy(parts[0])
        layer.keys = torch.cat([part.keys for part in parts])
        layer.values = torch.cat([part.values for part in parts])
        layers.append(layer)
    return _with_layers(caches[0], layers)


def _expanded(value: Tensor, batch: int) -> Tensor:
    return value.expand(batch, *value.shape[1:])
