"""Branch-Train-Stitch as one would write it down from the paper: no PEFT, one loop over all models' layers.

It follows equations 3 and 4 and the pseudo code of appendix B, with the experts' own states left intact, for a hub
and experts of one Llama shape, without padding. It is what the package's generality is measured against, and a
second opinion on its logits.
"""

import re

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput


class Stitch(nn.Module):
    """One stitch: a gate for all models at once, and a projection per expert."""

    def __init__(self, weights: dict[str, Tensor], experts: list[str]) -> None:
        super().__init__()
        self.into_hub = "gate.hub.weight" in weights
        gated = ["hub", *experts] if self.into_hub else experts
        self.gate_weight = nn.Parameter(torch.cat([weights[f"gate.{name}.weight"] for name in gated]))
        self.gate_bias = nn.Parameter(torch.cat([weights[f"gate.{name}.bias"] for name in gated]))
        self.proj = nn.ParameterList([weights[f"proj.{name}.weight"].clone() for name in experts])

    def forward(self, h: list[Tensor]) -> list[Tensor]:
        """States of the hub and of every expert, each (B, T, D) -> the same behind the stitch."""
        hub, *experts = (state.to(self.gate_weight.dtype) for state in h)
        logits = F.linear(hub, self.gate_weight, self.gate_bias).unflatten(-1, (-1, hub.shape[-1]))
        if self.into_hub:  # equation 3
            projected = [F.linear(state, weight) for state, weight in zip(experts, self.proj)]
            mixed = (logits.softmax(dim=2) * torch.stack([hub, *projected], dim=2)).sum(dim=2)
            return [mixed.to(h[0].dtype), *h[1:]]
        gates = logits.sigmoid().unbind(dim=2)  # equation 4
        mixed = [(1 - g) * state + g * F.linear(hub, weight) for g, state, weight in zip(gates, experts, self.proj)]
        return [h[0], *(state.to(h[0].dtype) for state in mixed)]


class PlainLoop(nn.Module):
    """The hub's logits, stitched.

    Args:
        stitched: The stitched model whose stitches are copied.
        hub, experts: Models of the same weights as those in it, of one shape; the experts in the order of their names.
    """

    def __init__(self, stitched: nn.Module, hub: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList([hub, *experts])
        weights: dict[int, dict[str, Tensor]] = {}
        for key, tensor in get_peft_model_state_dict(stitched).items():
            layer, name = re.search(r"\.layers\.(\d+)\.stitch_layer\.(.+)", key).groups()
            weights.setdefault(int(layer), {})[name] = tensor.detach()
        names = sorted(stitched.active_peft_config.experts)
        self.stitches = nn.ModuleDict({str(layer): Stitch(part, names) for layer, part in weights.items()})

    def new_cache(self) -> list[DynamicCache]:
        return [DynamicCache(config=model.config) for model in self.models]

    def forward(self, input_ids: Tensor, past_key_values=None, labels: Tensor | None = None) -> CausalLMOutput:
        """Logits (B, T, V) for `input_ids` (B, T), and the next-token loss if there are `labels`."""
        caches = past_key_values or ([None] * len(self.models) if torch.is_grad_enabled() else self.new_cache())
        past = caches[0].get_seq_length() if caches[0] is not None else 0
        position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past)[None]
        h = [model.model.embed_tokens(input_ids) for model in self.models]
        arguments = [
            {
                "attention_mask": create_causal_mask(model.config, h_i, None, cache, position_ids),
                "position_embeddings": model.model.rotary_emb(h_i, position_ids=position_ids),
                "position_ids": position_ids,
                "past_key_values": cache,
            }
            for model, h_i, cache in zip(self.models, h, caches)
        ]
        for layer in range(len(self.models[0].model.layers)):
            h = [model.model.layers[layer](h_i, **how) for model, h_i, how in zip(self.models, h, arguments)]
            if str(layer) in self.stitches:
                h = self.stitches[str(layer)](h)
        hub = self.models[0]
        logits = hub.lm_head(hub.model.norm(h[0]))
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(loss=hub.loss_function(logits, labels, vocab_size=logits.shape[-1]), logits=logits)
