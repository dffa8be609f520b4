"""A learned router that sends each token to one model."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class TokenRouter(nn.Module):
    """All models beside each other; of each token's predictions, one model's is taken.

    The gate is that of an output mixture, softmax over models of (W h_0 + b), with h_0 what the seed's head reads. It
    is trained to make the loss small that a draw from it would have, sum over models of g_m (-log p_m(x)), and takes
    the likeliest model when it is used. All models read all tokens, so it costs as much as the mixture.

    Args:
        models: The seed and the experts, which are frozen.
    """

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models).requires_grad_(False)
        self.gate = nn.Linear(models[0].config.hidden_size, len(models))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Optional[Tensor] = None,
        past_key_values: Optional[list[Any]] = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the chosen models, or the loss, where there are labels (B, T).

        `past_key_values`, taken and returned, are a list of the models' own.
        """
        caches = past_key_values or [None] * len(self.models)
        outs = [
            model(input_ids=input_ids, past_key_values=cache, use_cache=use_cache, output_hidden_states=number == 0)
            for number, (model, cache) in enumerate(zip(self.models, caches))
        ]
        gates = self.gate(outs[0].hidden_states[-1].float())  # (B, T, M)
        if labels is not None:
            nats = torch.stack([self._losses(out.logits, labels) for out in outs], dim=-1)  # (B, T-1, M)
            expected = (gates[:, :-1].softmax(-1) * nats).sum(-1)
            return CausalLMOutputWithPast(loss=expected.sum() / (labels[:, 1:] != -100).sum().clamp_min(1))
        choice = gates.argmax(-1)
        logits = outs[0].logits
        for number, out in enumerate(outs[1:], start=1):
            logits = torch.where((choice == number).unsqueeze(-1), out.logits, logits)
        return CausalLMOutputWithPast(logits=logits, past_key_values=[out.past_key_values for out in outs])

    @staticmethod
    def _losses(logits: Tensor, labels: Tensor) -> Tensor:
        """Of every token but the first, (B, T-1); 0 where the label is -100."""
        targets = labels[:, 1:]
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
