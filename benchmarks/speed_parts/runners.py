"""What is timed. A runner does its work once when it is called, and returns the seconds that count."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.benchmark import timer  # waits for the GPU
from transformers import DynamicCache, StaticCache


def alone(hub: torch.nn.Module, experts: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """What E, the unit of cost, runs: the hub, and every expert without its lm_head, whose logits nobody needs."""
    return [hub, *(expert.model for expert in experts)]


class Forward:
    """Plain forwards, one model after another, without gradients, in a context that is not timed."""

    def __init__(
        self,
        models: list[torch.nn.Module],
        ids: torch.Tensor,
        inside: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.models, self.ids, self.inside = models, ids, inside

    @torch.no_grad()
    def __call__(self) -> float:
        with self.inside():
            start = timer()
            for model in self.models:
                model(input_ids=self.ids)
            return timer() - start


class TrainingStep:
    """Forward, backward and AdamW on whatever of the models requires gradients; `times` multiplies the seconds."""

    def __init__(self, models: list[torch.nn.Module], ids: torch.Tensor, times: int = 1) -> None:
        self.models, self.ids, self.times = [model.train() for model in models], ids, times
        trained = [p for model in models for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def __call__(self) -> float:
        start = timer()
        for model in self.models:
            model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.times * (timer() - start)


class Decoding:
    """Greedy decoding behind a prompt, whose own time does not count, by hand: nothing of generate() is measured.

    Args:
        models: The first gives logits; the others run on the tokens that it chooses, each with its own cache.
        prompt: Token ids (B, T).
        tokens: How many to decode.
        inside: Makes the context in which prompt and tokens run.
        compile_options: Of `torch.compile`; the cache is then a static one, and each model's step one graph.
        static: A static cache without compilation.
    """

    def __init__(
        self,
        models: list[torch.nn.Module],
        prompt: torch.Tensor,
        tokens: int,
        inside: Callable[[], AbstractContextManager] = nullcontext,
        compile_options: dict | None = None,
        static: bool = False,
    ) -> None:
        self.models, self.prompt, self.tokens, self.inside = models, prompt, tokens, inside
        self.steps, self.static = models, []
        if compile_options is not None or static:
            # Made once: captured graphs write to the addresses they were captured with.
            length = prompt.shape[1] + tokens
            self.static = [StaticCache(config=model.config, max_cache_len=length) for model in models]
        if compile_options is not None:
            self.steps = [torch.compile(model, fullgraph=True, **compile_options) for model in models]
        self.chosen: torch.Tensor | None = None  # (B, 1 + tokens), of the last run

    @torch.no_grad()
    def __call__(self) -> float:
        for cache in self.static:
            cache.reset()
        caches = self.static or [new_cache(model) for model in self.models]
        with self.inside():
            chosen = [self._step(self.models, self.prompt, caches)]
            start = timer()
            for _ in range(self.tokens):
                if self.steps is not self.models:
                    torch.compiler.cudagraph_mark_step_begin()
                chosen.append(self._step(self.steps, chosen[-1], caches))
            elapsed = timer() - start
        self.chosen = torch.cat(chosen, dim=1)
        return elapsed

    def _step(self, models, ids, caches) -> torch.Tensor:
        first, *others = models
        token = first(input_ids=ids, past_key_values=caches[0]).logits[:, -1:].argmax(dim=-1)
        for model, cache in zip(others, caches[1:]):
            model(input_ids=ids, past_key_values=cache)
        return token


def new_cache(model: torch.nn.Module):
    """An empty cache for a model; the plain loop says itself what it takes."""
    return model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
