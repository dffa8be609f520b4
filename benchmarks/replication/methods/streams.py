"""What a method predicts, token by token: with caches, for decoding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .ensembles import BTM, Routing


class Stream:
    """A causal LM that is fed the next tokens (B, T) and gives log p of what follows them, (B, V)."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, None

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.all(tokens)[:, -1]

    def all(self, tokens: Tensor) -> Tensor:
        """log p of what follows each of these tokens: (B, T, V)."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits.float().log_softmax(-1)


class BTMStream:
    """Several of them, each weighted by its posterior given all tokens so far, see `posterior`."""

    def __init__(self, models: Sequence[nn.Module], forgetting: float = 1.0) -> None:
        self.streams, self.forgetting = [Stream(model) for model in models], forgetting
        self.evidence = self.last = None  # log p of the tokens so far, (M, B, 1), and of what follows, (M, B, V)

    def __call__(self, tokens: Tensor) -> Tensor:
        log_p = torch.stack([stream.all(tokens) for stream in self.streams])  # M, B, T, V
        # What predicted these tokens: of the first one, the call before. Nothing predicts the very first one.
        before = (
            log_p[:, :, :-1] if self.last is None else torch.cat([self.last.unsqueeze(2), log_p[:, :, :-1]], dim=2)
        )
        seen = tokens[:, tokens.shape[1] - before.shape[2] :].expand(len(log_p), -1, -1).unsqueeze(-1)
        evidence = torch.zeros_like(log_p[:, :, -1, :1]) if self.evidence is None else self.evidence
        for told in before.gather(-1, seen).unbind(2):
            evidence = self.forgetting * evidence + told
        self.evidence = evidence
        self.last = log_p[:, :, -1]
        return (self.evidence.log_softmax(0) + self.last).logsumexp(0)


class RoutedStream:
    """Each row by the one model that a router chose for its prompt."""

    def __init__(self, routing: Routing, prompts: Tensor, lengths: Tensor) -> None:
        choices = routing.choose(prompts, lengths).argmax(-1)
        self.groups = [  # rows, and the model that they go to
            ((choices == number).nonzero().squeeze(1), Stream(routing.models[number]))
            for number in choices.unique().tolist()
        ]

    def __call__(self, tokens: Tensor) -> Tensor:
        log_p = [stream(tokens[rows]) for rows, stream in self.groups]
        order = torch.cat([rows for rows, _ in self.groups]).argsort()
        return torch.cat(log_p)[order]


def stream_of(method: nn.Module | BTM | Routing, prompts: Tensor, lengths: Tensor) -> Callable[[Tensor], Tensor]:
    """A new stream of what a method predicts, for prompts (B, T) of these lengths (B,), zeros behind them."""
    if isinstance(method, BTM):
        return BTMStream(method.models, method.forgetting)
    return RoutedStream(method, prompts, lengths) if isinstance(method, Routing) else Stream(method)
