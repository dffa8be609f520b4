"""What is timed. A runner does its work once when it is called, and returns the seconds that count."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.utils.benchmark import timer  # waits for the GPU
from transformers import DynamicCache, StaticCache


Models = list[torch.nn.Module]
Inside = Callable[[], AbstractContextManager]  # makes the context of a run, which is not timed


def alone(hub: torch.nn.Module, experts: Models) -> Models:
    """What E, the unit of cost, runs: the hub, and every expert without its lm_head, whose logits nobody needs."""
    return [hub, *(expert.model for expert in experts)]


@dataclass
class Forward:
    """Plain forwards on `ids` (B, T), one model after another, without gradients."""

    models: Models
    ids: torch.Tensor
    inside: Inside = nullcontext

    @torch.no_grad()
    def __call__(self) -> float:
        with self.inside():
            start = timer()
            for model in self.models:
                model(input_ids=self.ids)
            return timer() - start


@dataclass
class TrainingStep:
    """Forward, backward and AdamW on whatever of the models requires gradients; `times` multiplies the seconds."""

    models: Models
    ids: torch.Tensor
    times: int = 1

    def __post_init__(self) -> None:
        trained = [p for model in self.models for p in model.train().parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def __call__(self) -> float:
        start = timer()
        for model in self.models:
            model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.times * (timer() - start)


@dataclass
class Decoding:
    """Greedy decoding of `tokens` tokens behind a prompt, which does not count; by hand, without generate().

    The first model gives logits; the others run on the tokens that it chooses, each with its own cache: a static one
    if `static`, or if there are options for `torch.compile`, by which each model's step then becomes one graph.
    """

    models: Models
    ids: torch.Tensor  # the prompt, (B, T)
    tokens: int
    inside: Inside = nullcontext
    compile_options: dict | None = None
    static: bool = False

    def __post_init__(self) -> None:
        self.steps, self.static_caches = self.models, []
        self.chosen: torch.Tensor | None = None  # (B, 1 + tokens), of the last run
        if self.compile_options is not None:
            self.steps = [torch.compile(model, fullgraph=True, **self.compile_options) for model in self.models]
        if self.compile_options is not None or self.static:
            # Made once: captured graphs write to the addresses they were captured with.
            length = self.ids.shape[1] + self.tokens
            self.static_caches = [StaticCache(config=model.config, max_cache_len=length) for model in self.models]

    @torch.no_grad()
    def __call__(self) -> float:
        for cache in self.static_caches:
            cache.reset()
        caches = self.static_caches or [new_cache(model) for model in self.models]
        with self.inside():
            chosen = [step(self.models, self.ids, caches)]
            start = timer()
            for _ in range(self.tokens):
                if self.compile_options is not None:
                    torch.compiler.cudagraph_mark_step_begin()
                chosen.append(step(self.steps, chosen[-1], caches))
            elapsed = timer() - start
        self.chosen = torch.cat(chosen, dim=1)
        return elapsed


def step(models: Models, ids: torch.Tensor, caches: list) -> torch.Tensor:
    """The next tokens (B, 1), by the first model."""
    first, *others = models
    token = first(input_ids=ids, past_key_values=caches[0]).logits[:, -1:].argmax(dim=-1)
    for model, cache in zip(others, caches[1:]):
        model(input_ids=ids, past_key_values=cache)
    return token


def new_cache(model: torch.nn.Module):
    """An empty cache for a model; the plain loop says itself what it takes."""
    return model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
