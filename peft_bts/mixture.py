"""The output mixture: what the models say, weighted by gates, as a plain torch module.

        p(x)  = sum over models of g_m p_m(x)
        g     = softmax over models of (W h_0 + b)
        g     = softmax over models of (W h_0 + b + a e)            with evidence
        e_t   = f e_(t-1) + log p_m(x_t | the tokens before it)

h_0 is the hub's state that its own head reads. The paper (arXiv 2502.00075) mixes hidden states and lets the hub's
head speak alone; this mixes distributions, and goes with stitches or without. Evidence e is how well a model has
predicted the tokens so far, with a forgetting factor f and a weight a, which starts at 1: with gates that are not
trained yet this is Bayesian model averaging with forgetting.

Shapes: N tokens, D the hub's width, M models (the hub first, then the experts by name), V the hub's vocabulary.
Names end in them.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stitch import HUB, Init, PerModel, check_init


class OutputMixture(nn.Module):
    """Gates over the models' distributions: one value per token and model.

    Weights: `gate` of the hub and of every expert, (1, D), with a bias (1). They start at zero: all models alike.
    With evidence `evidence_weight` (1), which starts at one.

    Args:
        d_hub: Width D of the hub.
        experts: The experts' names.
        forgetting: The forgetting factor of evidence, above 0 and up to 1; `None` for gates without evidence.
        init_weights: `True`: as above. `False`: random (tests).
        device, dtype: Of the weights.
    """

    def __init__(
        self,
        d_hub: int,
        experts: list[str],
        *,
        forgetting: Optional[float] = None,
        init_weights: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.d_hub, self.init_weights, self.forgetting = d_hub, init_weights, forgetting
        self.gate: PerModel[nn.Linear] = PerModel()
        for name in [HUB, *sorted(experts)]:
            self.gate.set(name, self._new_gate(device, dtype))
        if forgetting is not None:
            self.evidence_weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
            if not init_weights:
                nn.init.uniform_(self.evidence_weight, 0.5, 1.5)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that have a gate, sorted."""
        return sorted(name for name in self.gate.names() if name != HUB)

    @torch.no_grad()
    def add_expert(self, name: str, *, init: Init = "zero") -> None:
        """Make the gate of a new expert; `init` as for `ExpertsIntoHub.add_expert`."""
        check_init(init, gate_bias=True)
        hub = self.gate.of(HUB)
        gate = self._new_gate(hub.weight.device, hub.weight.dtype)
        if init == "closed":
            gate.bias.fill_(-6.0)
        elif init == "hub":
            gate.weight.copy_(hub.weight)
            gate.bias.copy_(hub.bias - 2.0)
        self.gate.set(name, gate.requires_grad_(hub.weight.requires_grad))

    def remove_expert(self, name: str) -> None:
        """Drop an expert's gate. The softmax renormalises over the rest by itself."""
        self.gate.remove(name)

    def log_gates(self, hub_ND: Tensor, names: list[str], present: Optional[dict[str, Tensor]] = None) -> Tensor:
        """Logarithms of the gates of the hub and the named experts, (..., N, M), in the dtype of the weights.

        Args:
            hub_ND: What the hub's head reads, (..., N, D).
            names: The experts that take part.
            present: Which tokens each of them takes part in, boolean (..., N) by name; `None`: all.
        """
        gates = [self.gate.of(name) for name in (HUB, *names)]
        h = hub_ND.to(gates[0].weight.device, gates[0].weight.dtype)
        logits_NM = torch.cat([gate(h) for gate in gates], dim=-1)
        if present is not None:
            everywhere = torch.ones_like(logits_NM[..., 0], dtype=torch.bool)
            present_NM = torch.stack([everywhere, *(present[name].to(h.device) for name in names)], dim=-1)
            logits_NM = logits_NM.masked_fill(~present_NM, -torch.inf)
        return logits_NM.log_softmax(dim=-1)

    def with_evidence(self, log_gates_NM: Tensor, evidence_NM: Tensor) -> Tensor:
        """Logarithms of the gates from those without evidence, and the evidence for each model, both (..., N, M)."""
        wide = torch.promote_types(log_gates_NM.dtype, torch.float32)  # sums grow too large for half precision
        weighed_NM = self.evidence_weight.to(wide) * evidence_NM.to(wide)
        return (log_gates_NM.to(wide) + weighed_NM).log_softmax(dim=-1)

    def _new_gate(self, device: Optional[torch.device], dtype: Optional[torch.dtype]) -> nn.Linear:
        gate = nn.Linear(self.d_hub, 1, device=device, dtype=dtype)
        if self.init_weights:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)
        return gate


def log_probs(logits_NV: Tensor, vocab: int) -> Tensor:
    """A model's log probabilities over the part of its vocabulary that it has in common with the hub, (N, vocab).

    Vocabularies differ by padding only. What the model has beyond the hub's is left out before the softmax; what the
    hub has beyond the model's has probability zero.
    """
    logits_NV = logits_NV[..., :vocab]
    if logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    missing = vocab - logits_NV.shape[-1]
    logp_NV = logits_NV.log_softmax(dim=-1)
    return F.pad(logp_NV, (0, missing), value=-torch.inf) if missing else logp_NV


def mix(log_gates_NM: Tensor, logps: list[Tensor]) -> Tensor:
    """Log probabilities of the mixture, (N, V), from the gates' logarithms and each model's log probabilities.

    The hub's come first. Sums run in that order, two at a time, so that no (N, M, V) tensor is ever made.
    """
    mixed_NV: Optional[Tensor] = None
    for log_gate_N, logp_NV in zip(log_gates_NM.unbind(dim=-1), logps):
        term_NV = log_gate_N[..., None].to(logp_NV.dtype) + logp_NV
        mixed_NV = term_NV if mixed_NV is None else torch.logaddexp(mixed_NV, term_NV)
    assert mixed_NV is not None
    return mixed_NV


_LEAST = -100.0  # of a token's log likelihood in evidence: one that a model cannot say must not count for ever
_BLOCK = 128  # tokens that are summed up by one product of matrices


def evidence(
    log_likelihoods_BTM: Tensor,
    text_BT: Tensor,
    first_BT: Tensor,
    forgetting: float,
    before_BM: Optional[Tensor] = None,
) -> Tensor:
    """What the tokens up to each one tell of the models: e_t = f e_(t-1) + log p_m(x_t), (B, T, M).

    Args:
        log_likelihoods_BTM: Of every token under every model, given the tokens before it; zero where nothing is told.
        text_BT: Which tokens are no padding, boolean: padding tells nothing, and nothing is forgotten over it.
        first_BT: Where a text begins, boolean: nothing from before counts there.
        forgetting: The factor f.
        before_BM: The evidence up to the token before the first one; `None`: there was none.

    Returns:
        In float32, or in the dtype of the log likelihoods if that is wider.
    """
    values_BTM = log_likelihoods_BTM.to(torch.promote_types(log_likelihoods_BTM.dtype, torch.float32))
    values_BTM = values_BTM.clamp(min=_LEAST)
    last_BM = values_BTM.new_zeros(values_BTM[:, 0].shape) if before_BM is None else before_BM.to(values_BTM)
    with torch.autocast(values_BTM.device.type, enabled=False):
        if values_BTM.shape[1] <= _BLOCK:  # no loop: compiled, it would make a graph for every number of tokens
            return _block_evidence(values_BTM, text_BT, first_BT, forgetting, last_BM)
        blocks = []
        parts = (part.split(_BLOCK, dim=1) for part in (values_BTM, text_BT, first_BT))
        for values_BtM, text_Bt, first_Bt in zip(*parts):
            blocks.append(_block_evidence(values_BtM, text_Bt, first_Bt, forgetting, last_BM))
            last_BM = blocks[-1][:, -1]
    return torch.cat(blocks, dim=1)


def _block_evidence(
    values_BtM: Tensor, text_Bt: Tensor, first_Bt: Tensor, forgetting: float, last_BM: Tensor
) -> Tensor:
    t = torch.arange(values_BtM.shape[1], device=values_BtM.device)
    count_Bt = text_Bt.cumsum(dim=1).to(values_BtM.dtype)
    age_Btt = (count_Bt[:, :, None] - count_Bt[:, None, :]).clamp(min=0)
    number_Bt = first_Bt.cumsum(dim=1)  # of the text that a token belongs to
    told_Btt = (number_Bt[:, :, None] == number_Bt[:, None, :]) & (t[:, None] >= t)
    goes_on_Bt = forgetting**count_Bt * (number_Bt == 0)
    return (forgetting**age_Btt * told_Btt) @ values_BtM + goes_on_Bt[:, :, None] * last_BM[:, None]
