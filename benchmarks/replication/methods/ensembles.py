"""Several whole models side by side: BTM mixes their predictions, expert routing picks one model per sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..branching.training import autocast, device_of


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """A causal LM's log p(next token): (B, T) -> (B, T, V), float32."""
    device = device_of(model)
    with autocast(device):
        logits = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.float().log_softmax(-1)


def posterior(log_p_next: Tensor, forgetting: float = 1.0) -> Tensor:
    """log p(model | prefix) by Bayes' rule from a uniform prior: (M, B, T-1) -> (M, B, T).

    Args:
        log_p_next: Every model's log probability of the token that did come next.
        forgetting: By which factor a token counts less with every further one; 1 is Bayes' rule.

    Returns:
        At place t, the posterior after the tokens up to and including t; uniform at place 0, since no model
        predicts the first token.
    """
    evidence = [torch.zeros_like(log_p_next[..., 0])]
    for told in log_p_next.unbind(-1):
        evidence.append(forgetting * evidence[-1] + told)
    return torch.stack(evidence, dim=-1).log_softmax(0)


class BTM:
    """Branch-Train-Merge: the models' distributions, weighted by the posterior over models given the prefix.

    Args:
        models: The models.
        forgetting: See `posterior`.
    """

    def __init__(self, models: list[nn.Module], forgetting: float = 1.0) -> None:
        self.models, self.forgetting = models, forgetting

    def __call__(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        log_p = torch.stack([log_probabilities(model, tokens) for model in self.models])  # M, B, T, V
        next_tokens = tokens[:, 1:].to(log_p.device).expand(len(log_p), -1, -1).unsqueeze(-1)
        weights = posterior(log_p[:, :, :-1].gather(-1, next_tokens).squeeze(-1), self.forgetting)
        return (log_p + weights.unsqueeze(-1)).logsumexp(0)


class Routing:
    """A linear router on the prompt's mean embedding sends the whole sequence to one model."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.models = models
        self.embed = models[0].get_input_embeddings()
        self.router = nn.Linear(self.embed.embedding_dim, len(models)).to(self.embed.weight.device)

    def choose(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """The router's logits (B, M) from the first `prompt` (B,) tokens of each sequence."""
        tokens, prompt = tokens.to(self.embed.weight.device), prompt.to(self.embed.weight.device)
        seen = torch.arange(tokens.shape[1], device=tokens.device) < prompt.unsqueeze(1)
        embedded = self.embed(tokens).detach().float() * seen.unsqueeze(-1)
        return self.router(embedded.sum(1) / prompt.unsqueeze(1))

    def fit(self, blocks: Tensor, *, learning_rate: float, seed: int, epochs: int = 20) -> dict[str, float]:
        """Train the router to find the model with the smallest loss on each block (N, 2, T).

        The paper draws prompts of 32 to 256 tokens; here they are of 1/16 of a block to all of it.
        """
        generator = torch.Generator().manual_seed(seed)
        losses = torch.stack([sequence_losses(model, blocks) for model in self.models], dim=1)
        best, tokens = losses.argmin(1), blocks[:, 0]
        optimizer = torch.optim.AdamW(self.router.parameters(), lr=learning_rate, weight_decay=0.0)
        for _ in range(epochs):
            for places in torch.randperm(len(blocks), generator=generator).split(32):
                prompt = torch.randint(tokens.shape[1] // 16, tokens.shape[1] + 1, (len(places),), generator=generator)
                loss = F.cross_entropy(self.choose(tokens[places], prompt), best[places].to(self.router.weight.device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": loss.item()}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        choices = self.choose(tokens, prompt).argmax(-1)
        out = None
        for index, model in enumerate(self.models):
            places = (choices == index).nonzero().squeeze(-1)
            if len(places):
                part = log_probabilities(model, tokens[places.to(tokens.device)])
                out = part.new_zeros(len(tokens), *part.shape[1:]) if out is None else out
                out[places] = part
        return out


@torch.no_grad()
def sequence_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """The mean loss of every block: (N, 2, T) -> (N,)."""
    losses = []
    for part in blocks.split(32):
        log_p, labels = log_probabilities(model, part[:, 0])[:, :-1], part[:, 1, 1:]
        scored = (labels != -100).to(log_p.device)
        loss = -log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1).to(log_p.device)).squeeze(-1) * scored
        losses.append(loss.sum(1) / scored.sum(1).clamp_min(1))
    return torch.cat(losses)
