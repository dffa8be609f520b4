"""BTX and BAM: one Llama whose blocks hold the seed's and the experts' side by side, mixed by a router per token.

Everything that is not mixed (embeddings, norms, head; for BTX attention too) is the average of all models.

    BTX Soft     the FFNs of all models, weighted by a softmax; everything is trained
    BTX Sample   one FFN per token, drawn by a Gumbel softmax in training, the most likely one later
    BAM adapters FFNs *and* attentions of all models, weighted by a softmax, all frozen; a projection behind each of
                 them is trained, and the routers
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_bts.toy import average_weights


class Router(nn.Module):
    """Weights of the models for every token: (..., D) -> (..., M). It starts undecided."""

    def __init__(self, width: int, models: int, kind: Literal["soft", "sample"]) -> None:
        super().__init__()
        self.score, self.kind = nn.Linear(width, models, bias=False), kind
        nn.init.zeros_(self.score.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.score(x).float()
        if self.kind == "soft":
            return logits.softmax(-1)
        if self.training:  # one-hot forward, the softmax's gradient backward
            return F.gumbel_softmax(logits, hard=True)
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


class MixedFFN(nn.Module):
    """Takes the place of a decoder layer's `mlp`. `project`: behind each FFN, a trained projection."""

    def __init__(self, ffns: list[nn.Module], width: int, kind: str = "soft", project: bool = False) -> None:
        super().__init__()
        self.ffns, self.router = nn.ModuleList(ffns), Router(width, len(ffns), kind)
        self.projections = identities(width, len(ffns)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).to(x.dtype)
        if self.router.kind == "sample":
            return self._sparse(x, weights)
        outs = [ffn(x) for ffn in self.ffns]
        if self.projections is not None:
            outs = [projection(out) for projection, out in zip(self.projections, outs)]
        return sum(weight.unsqueeze(-1) * out for weight, out in zip(weights.unbind(-1), outs))

    def _sparse(self, x: Tensor, weights: Tensor) -> Tensor:
        """Every FFN sees only the tokens that chose it."""
        flat, weights = x.flatten(0, -2), weights.flatten(0, -2)
        out, chosen = torch.zeros_like(flat), weights.argmax(-1)
        for index, ffn in enumerate(self.ffns):
            places = (chosen == index).nonzero().squeeze(-1)
            if len(places):
                out = out.index_add(0, places, (weights[places, index, None] * ffn(flat[places])).to(out.dtype))
        return out.view_as(x)


class MixedAttention(nn.Module):
    """Takes the place of a decoder layer's `self_attn`."""

    def __init__(self, attentions: list[nn.Module], width: int) -> None:
        super().__init__()
        self.attentions, self.router = nn.ModuleList(attentions), Router(width, len(attentions), "soft")
        self.projections = identities(width, len(attentions))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        weights = self.router(hidden_states).to(hidden_states.dtype)
        outs = [attention(hidden_states=hidden_states, **kwargs)[0] for attention in self.attentions]
        outs = [projection(out) for projection, out in zip(self.projections, outs)]
        return sum(weight.unsqueeze(-1) * out for weight, out in zip(weights.unbind(-1), outs)), None


def identities(width: int, count: int) -> nn.ModuleList:
    projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
    for projection in projections:
        nn.init.eye_(projection.weight)
    return projections


def btx(models: list[nn.Module], kind: Literal["soft", "sample"]) -> nn.Module:
    """Branch-Train-MiX. The models give their FFNs away: do not use them afterwards."""
    mixed = average_weights(models)
    for index, layer in enumerate(mixed.model.layers):
        layer.mlp = MixedFFN([m.model.layers[index].mlp for m in models], mixed.config.hidden_size, kind)
    return mixed.requires_grad_(True).eval()


def bam_adapters(models: list[nn.Module]) -> nn.Module:
    """BAM with frozen experts. The models give FFNs and attentions away: do not use them afterwards."""
    mixed, width = average_weights(models), models[0].config.hidden_size
    for index, layer in enumerate(mixed.model.layers):
        layers = [m.model.layers[index] for m in models]
        layer.mlp = MixedFFN([layer.mlp for layer in layers], width, project=True)
        layer.self_attn = MixedAttention([layer.self_attn for layer in layers], width)
    mixed.requires_grad_(False)
    for module in mixed.modules():
        if isinstance(module, (MixedFFN, MixedAttention)):
            module.router.requires_grad_(True)
            module.projections.requires_grad_(True)
    return mixed.eval()
