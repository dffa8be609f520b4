"""The two stitch layers of the paper, as plain torch modules (arXiv 2502.00075, equations 3 and 4).

Shapes: B sequences, T tokens, D the hub's width, D_i expert i's. Names end in them: `hub_BTD` is (B, T, D).
The maths runs in the dtype of the stitch's weights; every result has the dtype of the stream it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import M, TypedModuleDict


HUB = "hub"
Init = Literal["zero", "hub", "closed"]
Observe = Callable[[dict[str, Tensor]], None]  # is told the gates by model: (B, T, D_gate), or (B, T, 1) per token


class PerModel(TypedModuleDict[M]):
    """Modules by model name.

    In memory a module's key is `for_<name>`. The prefix lets an expert have the name of an `nn.Module` attribute
    (`eval`, `half`, `type`). It also keeps PEFT, which looks for `.<adapter>.` in keys, from mistaking an expert for
    an adapter of the same name. The adapter file has the plain names.
    """

    PREFIX = "for_"

    def set(self, name: str, module: M) -> None:
        self[self.PREFIX + name] = module

    def of(self, name: str) -> M:
        return self[self.PREFIX + name]

    def remove(self, name: str) -> None:
        del self[self.PREFIX + name]

    def names(self) -> list[str]:
        return [key.removeprefix(self.PREFIX) for key in self.keys()]


class LowRankProjection(nn.Module):
    """`eye(d_out, d_in) + up @ down`, of which only `down` (r, d_in) and `up` (d_out, r) are weights."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        *,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.down = nn.Linear(d_in, r, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(r, d_out, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        identity = x[..., : self.d_out] if self.d_in >= self.d_out else F.pad(x, (0, self.d_out - self.d_in))
        return identity + self.up(self.down(x))


Projection = Union[nn.Linear, LowRankProjection]


class _Stitch(nn.Module):
    """Base of both kinds: a gate and a projection per model, how they start, and how models come and go."""

    kind: str

    def __init__(
        self,
        d_hub: int,
        d_experts: dict[str, int],
        *,
        gate: Literal["channel", "token"] = "channel",
        gate_bias: bool = True,
        gate_dropout: float = 0.0,
        r: Optional[int] = None,
        init_weights: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.d_hub = d_hub
        self.gate_per_channel = gate == "channel"
        self.gate_bias = gate_bias
        self.gate_dropout = gate_dropout
        self.r = r
        self.init_weights = init_weights
        self.gate: PerModel[nn.Linear] = PerModel()
        self.proj: PerModel[Projection] = PerModel()
        for name in sorted(d_experts):
            self.add_expert(name, d_experts[name], device=device, dtype=dtype)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that have weights here, in the order in which sums run: sorted."""
        return sorted(self.proj.names())

    def add_expert(
        self,
        name: str,
        d_expert: int,
        *,
        init: Init = "zero",
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Make the weights of a new expert of width `d_expert`; the others' are not touched.

        `init` is the new gate's start: `"zero"`; `"hub"`, the hub's own gate with 2 taken off its bias; `"closed"`,
        a bias of -6, so that the new expert takes less than 1% of any gate. The projection starts as the identity.
        Only Experts-into-Hub gates differ by `init`: the other kind has no part in what the hub computes until the
        expert's own gate into the hub opens.

        Raises:
            ValueError: If `init` is unknown, or needs a bias and the gates have none.
        """
        check_init(init, self.gate_bias)
        like = next(self.parameters(), None)  # unless told otherwise, where and what the other weights are
        if like is not None:
            device, dtype = device or like.device, dtype or like.dtype
        factory = {"device": device, "dtype": dtype}
        gate, projection = self._new_gate(d_expert, factory), self._new_projection(d_expert, factory)
        if init != "zero":
            self._init_gate(gate, init)
        self.gate.set(name, gate)
        self.proj.set(name, projection)

    def remove_expert(self, name: str) -> None:
        """Drop the weights of an expert. Softmax gates renormalise over the rest by themselves."""
        self.gate.remove(name)
        self.proj.remove(name)

    def _shapes(self, d_expert: int) -> tuple[int, int, int]:
        """(gate's output, projection's input, projection's output) for an expert of this width."""
        raise NotImplementedError

    def _init_gate(self, gate: nn.Linear, init: Init) -> None:
        """Set a new expert's gate to a start other than zero."""

    @torch.no_grad()
    def _new_gate(self, d_expert: int, factory: dict[str, Any]) -> nn.Linear:
        d_gate = self._shapes(d_expert)[0] if self.gate_per_channel else 1
        gate = self._new_linear(self.d_hub, d_gate, self.gate_bias, factory)
        if self.init_weights:
            gate.weight.zero_()
            if self.gate_bias:
                gate.bias.zero_()
        return gate

    @torch.no_grad()
    def _new_projection(self, d_expert: int, factory: dict[str, Any]) -> Projection:
        _, d_in, d_out = self._shapes(d_expert)
        if self.r is not None:
            low_rank = LowRankProjection(d_in, d_out, self.r, **factory)
            if self.init_weights:
                low_rank.up.weight.zero_()  # the identity; `down` stays random, or no gradient would ever flow
            return low_rank
        projection = self._new_linear(d_in, d_out, False, factory)
        if self.init_weights and not projection.weight.is_meta:  # serving engines make models without weights
            nn.init.eye_(projection.weight)
        return projection

    def _new_linear(self, d_in: int, d_out: int, bias: bool, factory: dict[str, Any]) -> nn.Linear:
        if not self.init_weights:
            return nn.Linear(d_in, d_out, bias=bias, **factory)
        # Random numbers would only be overwritten, and take seconds in wide models.
        linear = nn.Linear(d_in, d_out, bias=bias, device="meta", dtype=factory["dtype"])
        for name, parameter in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(torch.empty(parameter.shape, **factory)))
        return linear

    def _gate_logits(self, hub_BTD: Tensor, names: list[str]) -> list[Tensor]:
        """Gate logits of the named models, each (B, T, D_gate) or (B, T, 1), after dropout."""
        gates = [self.gate.of(name) for name in names]
        logits = [gate(hub_BTD) for gate in gates]
        if self.gate_dropout and self.training:
            logits = [F.dropout(logit, self.gate_dropout) for logit in logits]
        return logits

    def extra_repr(self) -> str:
        gate = "channel" if self.gate_per_channel else "token"
        return f"d_hub={self.d_hub}, experts={self.experts}, gate={gate}, r={self.r}"


class ExpertsIntoHub(_Stitch):
    """Experts-into-Hub (eq. 3): the hub's new state is a gated sum of its own and the experts' projected states.

        g      = softmax over the 1 + n models of (W_gate h_0 + b)          per channel, or per token
        p_i    = W_proj_i h_i
        h_0'   = g_0 * h_0 + sum_i g_i * p_i

    Weights: `gate` of the hub and of every expert (D, D) or (1, D), `proj` of every expert (D, D_i).

    Args:
        d_hub: Width D of the hub.
        d_experts: Width D_i of each expert, by name.
        gate, gate_bias, gate_dropout, r, init_weights: As in `StitchConfig`.
        device, dtype: Of the weights.
    """

    kind: Literal["experts_into_hub"] = "experts_into_hub"

    def __init__(
        self,
        d_hub: int,
        d_experts: dict[str, int],
        *,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **options: Any,
    ) -> None:
        super().__init__(d_hub, d_experts, device=device, dtype=dtype, **options)
        self.gate.set(HUB, self._new_gate(d_hub, {"device": device, "dtype": dtype}))

    def _shapes(self, d_expert: int) -> tuple[int, int, int]:
        return self.d_hub, d_expert, self.d_hub

    @torch.no_grad()
    def _init_gate(self, gate: nn.Linear, init: Init) -> None:
        if init == "closed":
            gate.bias.fill_(-6.0)
        elif init == "hub":
            gate.weight.copy_(self.gate.of(HUB).weight)
            gate.bias.copy_(self.gate.of(HUB).bias - 2.0)

    def forward(
        self,
        hub_BTD: Tensor,
        expert_states: dict[str, Tensor],
        observe: Optional[Observe] = None,
        present: Optional[dict[str, Tensor]] = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix the given experts into the hub; an expert that is not given takes no part in the softmax.

        Args:
            hub_BTD: h_0.
            expert_states: h_i by name, each (B, T, D_i).
            observe: Called with the gates g by model, the hub first.
            present: Which sequences each given expert takes part in, (B,) and boolean by name; `None`: all.

        Returns:
            The hub's new state (B, T, D) in the dtype of `hub_BTD`, and the projections p_i by name, each (B, T, D),
            in the dtype of the expert's state (what eq. 3 hands on as the expert's state).
        """
        projected = {name: self.projection(name, expert_states[name]) for name in sorted(expert_states)}
        mixed_BTD = self.mix(hub_BTD, projected, observe, present)
        return mixed_BTD, {name: p_BTD.to(expert_states[name].dtype) for name, p_BTD in projected.items()}

    def mix(
        self,
        hub_BTD: Tensor,
        projected: dict[str, Tensor],
        observe: Optional[Observe] = None,
        present: Optional[dict[str, Tensor]] = None,
    ) -> Tensor:
        """The hub's new state (B, T, D), from its own and the projections p_i by name, in order (`projection`).

        The other arguments are those of `forward`, which is this behind the projections.
        """
        names = list(projected)
        h_BTD = hub_BTD.to(self.gate.of(HUB).weight.dtype)
        g = self.gates(h_BTD, names, present).unbind(dim=-2)
        if observe is not None:
            observe(dict(zip([HUB, *names], g)))
        mixed_BTD = g[0] * h_BTD
        for gate_BTD, p_BTD in zip(g[1:], projected.values()):
            # 0 * inf would be NaN: an expert that has no part in a token at all cannot spoil it by overflowing.
            mixed_BTD = torch.addcmul(mixed_BTD, gate_BTD, p_BTD.masked_fill(gate_BTD == 0, 0))
        return mixed_BTD.to(hub_BTD.dtype)

    def projection(self, name: str, state: Tensor) -> Tensor:
        """An expert's projected state p_i, (..., D_i) -> (..., D), in the dtype of the weights."""
        projection = self.proj.of(name)
        return projection(state.to(next(projection.parameters()).dtype))

    def project(self, name: str, state: Tensor) -> Tensor:
        """The same in the dtype it came in."""
        return self.projection(name, state).to(state.dtype)

    def gates(self, hub_BTD: Tensor, names: list[str], present: Optional[dict[str, Tensor]] = None) -> Tensor:
        """The gates g of the hub and the named experts: (B, T, M, D), or (B, T, M, 1) per token. See `forward`.

        They depend on the hub's state alone: what an expert would get is known before it has run.
        """
        # Softmax over a stacked axis in the middle keeps the channels contiguous: 1.4x faster than a last axis.
        logits_BTMD = torch.stack(self._gate_logits(hub_BTD, [HUB, *names]), dim=-2)
        if present is not None:
            hub = torch.ones(len(hub_BTD), dtype=torch.bool, device=hub_BTD.device)
            present_BM = torch.stack([hub, *(present[name].to(hub.device) for name in names)], dim=-1)
            logits_BTMD = logits_BTMD.masked_fill(~present_BM[:, None, :, None], -torch.inf)
        return logits_BTMD.softmax(dim=-2)


class HubIntoExperts(_Stitch):
    """Hub-into-Experts (eq. 4): every expert takes in the hub's projected state through a gate of its own.

        g_i    = sigmoid(W_gate_i h_0 + b_i)                                per channel, or per token
        h_i'   = (1 - g_i) * h_i + g_i * W_proj_i h_0

    The hub's state stays as it is. Weights, for every expert: `gate` (D_i, D) or (1, D), `proj` (D_i, D).

    Args: As for `ExpertsIntoHub`.
    """

    kind: Literal["hub_into_experts"] = "hub_into_experts"

    def _shapes(self, d_expert: int) -> tuple[int, int, int]:
        return d_expert, self.d_hub, d_expert

    def forward(
        self, hub_BTD: Tensor, expert_states: dict[str, Tensor], observe: Optional[Observe] = None
    ) -> dict[str, Tensor]:
        """Return the new state of every given expert: (B, T, D_i), in the dtype it came in.

        `observe` is called with the gate g_i of one expert after the other.
        """
        names = sorted(expert_states)
        dtype = self.gate.of(names[0]).weight.dtype
        h_BTD = hub_BTD.to(dtype)
        new_states = {}
        for name, logits in zip(names, self._gate_logits(h_BTD, names)):
            state, gate = expert_states[name].to(dtype), logits.sigmoid()
            if observe is not None:
                observe({name: gate})
            mixed = torch.addcmul(state, gate, self.proj.of(name)(h_BTD) - state)
            new_states[name] = mixed.to(expert_states[name].dtype)
        return new_states


Stitch = Union[ExpertsIntoHub, HubIntoExperts]


def check_init(init: str, gate_bias: bool) -> None:
    """Raise `ValueError` unless `init` is a known start of a new expert's gate that these gates can take."""
    if init not in ("zero", "hub", "closed"):
        raise ValueError(f"init must be 'zero', 'hub' or 'closed', got {init!r}.")
    if init != "zero" and not gate_bias:
        raise ValueError(f"init={init!r} sets the new gate's bias, but this adapter has gate_bias=False; use 'zero'.")


def make_stitch(kind: str, d_hub: int, d_experts: dict[str, int], **options: Any) -> Stitch:
    """Make a stitch of a kind, `"experts_into_hub"` or `"hub_into_experts"`; arguments as for its class."""
    return (ExpertsIntoHub if kind == ExpertsIntoHub.kind else HubIntoExperts)(d_hub, d_experts, **options)
