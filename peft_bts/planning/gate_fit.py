"""Output gates fitted on cached numbers: what every model says about every token, and the hub's states."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixture import OutputMixture


_STEPS, _RATE = 1000, 0.05
_CHECK, _PATIENCE = 5, 20  # the held-out loss is looked at every 5 steps; 20 looks without a better one end it


@dataclass
class Tokens:
    """Tokens of one domain.

    Attributes:
        states: What the hub's head reads before each of them, (N, D), of any floating dtype.
        log_likelihoods: The log probability that each model gives it, hub first, (N, M), at least float32.
    """

    states: Tensor
    log_likelihoods: Tensor


class FittedGates:
    """Gates of an output mixture, on states whose channels are brought to one scale first."""

    def __init__(self, mixture: OutputMixture, centre: Tensor, scale: Tensor) -> None:
        self._mixture, self._centre, self._scale = mixture, centre, scale

    @torch.no_grad()
    def log_likelihoods(self, tokens: Tokens) -> Tensor:
        """The log probability that the mixture gives each token, (N,)."""
        pieces = [
            self._mix(self.scaled(states), log_likelihoods)
            for states, log_likelihoods in zip(tokens.states.split(8192), tokens.log_likelihoods.split(8192))
        ]
        return torch.cat(pieces)

    def scaled(self, states: Tensor) -> Tensor:
        """States as the gates read them, (N, D), float32."""
        return (states.float() - self._centre) / self._scale

    def loss(self, domains: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean over domains of the loss per token, from scaled states and log likelihoods."""
        return -torch.stack([self._mix(states, logp).mean() for states, logp in domains]).mean()

    def _mix(self, scaled: Tensor, log_likelihoods: Tensor) -> Tensor:
        return (self._mixture.log_gates(scaled, self._mixture.experts) + log_likelihoods).logsumexp(dim=-1)


def fit_gates(fitted: Sequence[Tokens], held_out: Sequence[Tokens], experts: list[str]) -> FittedGates:
    """Fit gates to some tokens, every domain with the same weight, until held-out tokens gain no more.

    The gates start as all models alike; Adam takes steps on all tokens at once, so that nothing is random. The gates
    that did best on the held-out tokens are returned.

    Args:
        fitted, held_out: Tokens by domain.
        experts: Names of the experts, sorted, as the columns of `log_likelihoods` behind the hub's.
    """
    states = torch.cat([tokens.states.float() for tokens in fitted])
    width = states.shape[-1]
    spread = states.std(dim=0, correction=0)
    # With the square root of the width, a step moves the logits alike at every width.
    gates = FittedGates(
        OutputMixture(width, experts), states.mean(0), torch.where(spread > 0, spread, 1.0) * math.sqrt(width)
    )
    del states
    train = [(gates.scaled(tokens.states), tokens.log_likelihoods) for tokens in fitted]
    check = [(gates.scaled(tokens.states), tokens.log_likelihoods) for tokens in held_out]
    mixture = gates._mixture
    optimizer = torch.optim.Adam(mixture.parameters(), lr=_RATE)
    best, kept, since = math.inf, copy.deepcopy(mixture.state_dict()), 0
    with torch.enable_grad():
        for step in range(_STEPS):
            if step % _CHECK == 0:
                with torch.no_grad():
                    loss = gates.loss(check).item()
                since += 1
                if loss < best:
                    best, kept, since = loss, copy.deepcopy(mixture.state_dict()), 0
                if since == _PATIENCE:
                    break
            optimizer.zero_grad()
            gates.loss(train).backward()
            optimizer.step()
    mixture.load_state_dict(kept)
    return gates
