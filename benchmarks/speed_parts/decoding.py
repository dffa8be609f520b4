"""Greedy decoding, token by token, written by hand: nothing of generate() is measured along."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import DynamicCache, StaticCache

from .timing import seconds


class Decoding:
    """Decodes `tokens` tokens behind a prompt, and returns the seconds of that, without the prompt's.

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
        self.steps, self.compiled = models, compile_options is not None
        self.caches = None
        if self.compiled or static:
            # Made once: captured graphs write to the addresses they were captured with.
            length = prompt.shape[1] + tokens
            self.caches = [StaticCache(config=model.config, max_cache_len=length) for model in models]
        if self.compiled:
            self.steps = [torch.compile(model, fullgraph=True, **compile_options) for model in models]
        self.chosen: torch.Tensor | None = None  # (B, 1 + tokens), of the last run

    @torch.no_grad()
    def __call__(self) -> float:
        if self.caches is None:
            caches = [new_cache(model) for model in self.models]
        else:
            caches = self.caches
            for cache in caches:
                cache.reset()
        with self.inside():
            chosen = [self._step(self.models, self.prompt, caches)]

            def loop() -> None:
                for _ in range(self.tokens):
                    if self.compiled:
                        torch.compiler.cudagraph_mark_step_begin()
                    chosen.append(self._step(self.steps, chosen[-1], caches))

            elapsed = seconds(loop, self.prompt.device.type)
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
