"""What a stitched model does at inference: `generate()`, and the two ways to run its experts more cheaply."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

from ..forward.cache import caches_roll_back
from ..forward.observers import generation
from .dropping import Dropping
from .stacking import stacked
from .threads import stream_threads


_COUNTING = threading.Lock()


class Generating:
    """The part of `StitchModel` (model.py) that users call to generate text."""

    @contextmanager
    def drop_experts(
        self, max_active_experts: Optional[int] = None, expert_threshold: Optional[float] = None
    ) -> Iterator[None]:
        """Leave out the experts that a sequence does not listen to, while it is decoded with a cache in this thread.

        Inside of the `with`, forwards over several tokens (prompts) run all experts. Forwards over one token run, for
        every sequence of the batch by itself, the experts with the largest gates of the last stitch over the last few
        tokens; the others' gates are zero. An expert whose gate opens again first runs over what it has missed, at
        once, and is where it would be had it run all along. `generate` takes the same arguments.

        Args:
            max_active_experts: At most so many experts per sequence and token.
            expert_threshold: Only experts with a mean gate of at least this, from 0 to 1.

        Raises:
            ValueError: If neither is given, or a value is out of range. Forwards raise it for caches other than a
                plain `DynamicCache`, and for masks and positions that are not 2D.
        """
        policy, before = Dropping(max_active_experts, expert_threshold), self._dropping.get()
        with _COUNTING:
            self._droppings += 1
        self._dropping.set(policy)
        try:
            yield
        finally:
            self._dropping.set(before)
            with _COUNTING:
                self._droppings -= 1

    @contextmanager
    def parallel_streams(self, threads: int = 2, *, stack: bool = False) -> Iterator[None]:
        """Run hub and experts side by side, for inference: they need each other at stitches only.

        Inside of the `with`, forwards without gradients (`generate`, `torch.no_grad`) run on several threads. It pays
        on a CPU where one operation is too small for all cores, as in decoding. Every operation gets its share of
        PyTorch's threads (`torch.get_num_threads() // threads`), and computes what it computes with that many
        threads otherwise. Forwards with gradients, and compiled ones, run as ever.

        `stack=True` also has the active adapter's experts of one architecture decode as one batch: forwards over one
        token per sequence, on a CPU of at most 2 sequences, do one matrix product for all of them. Results are the
        same but for rounding, as with another batch size. Their weights move into common storage, one matrix after
        the other, and back at the end; so nothing is in memory twice, but for these moments. Forwards that leave out
        experts (`drop_experts`), and those with other caches than a plain `DynamicCache`, run without stacks.

        Args:
            threads: How many models run at a time, mostly the number of cores; at least 2, or 1 with `stack`.
            stack: Run experts that are alike as one.

        Raises:
            ValueError: If `threads` is out of range, or there are no two experts to stack; the message says why.
            RuntimeError: If it is on already.
        """
        least = 1 if stack else 2
        if not isinstance(threads, int) or threads < least:
            raise ValueError(f"threads must be an integer of at least {least}, got {threads!r}.")
        with ExitStack() as entered:
            if not self._runs.in_parallel.acquire(blocking=False):
                raise RuntimeError("parallel_streams() is on already.")
            entered.callback(self._runs.in_parallel.release)
            experts = self._plans[self._single_active_adapter()].experts if stack else {}
            stacks = entered.enter_context(stacked(experts)) if stack else ()
            pool = entered.enter_context(stream_threads(threads)) if threads > 1 else None
            self._runs.pool, self._runs.stacks = pool, stacks
            try:
                yield
            finally:
                self._runs.pool, self._runs.stacks = None, ()

    def generate(
        self,
        *args: Any,
        max_active_experts: Optional[int] = None,
        expert_threshold: Optional[float] = None,
        **kwargs: Any,
    ) -> Any:
        """The hub's `generate`, which knows nothing of the experts: what they cannot do is refused here.

        Args:
            max_active_experts, expert_threshold: Leave out experts meanwhile, see `drop_experts`.

        Raises:
            ValueError: For drafts that would have to be taken back from an expert with recurrent states, and for
                continuous batching; with experts left out, for all that needs more than going on: beams, drafts,
                other caches than `DynamicCache`, or none.
        """
        if max_active_experts is not None or expert_threshold is not None:
            with self.drop_experts(max_active_experts, expert_threshold):
                return self.generate(*args, **kwargs)
        plan = self._active_plan()
        configs = [kwargs.get("generation_config"), *args[1:2], self.model.generation_config]

        def asked_for(option: str) -> Any:
            given = [kwargs.get(option), *(getattr(config, option, None) for config in configs)]
            return next((value for value in given if value is not None), None)

        drafts = kwargs.get("assistant_model") is not None or asked_for("prompt_lookup_num_tokens")
        if plan is not None and drafts:
            for name, expert in plan.experts.items():
                if getattr(expert.model, "_is_stateful", False):
                    raise ValueError(
                        f"Drafts have to be taken back where they were wrong, and expert {name!r} "
                        f"({expert.config.model_type}) is stateful: it cannot. Generate without `assistant_model` and "
                        "`prompt_lookup_num_tokens`, or leave the expert out (`set_active_experts`)."
                    )
        if plan is not None and self._dropping.get() is not None:
            refused = {
                "num_beams": asked_for("num_beams") not in (None, 1),
                "assistant_model or prompt_lookup_num_tokens": drafts,
                "cache_implementation": asked_for("cache_implementation") not in (None, "dynamic"),
                "use_cache=False": asked_for("use_cache") is False,
            }
            if any(refused.values()):
                found = next(name for name, is_so in refused.items() if is_so)
                raise ValueError(
                    f"Experts cannot be left out while generating with {found}: sequences can only be continued, with "
                    "a DynamicCache. Generate without it, or without max_active_experts and expert_threshold."
                )
        if plan is not None and asked_for("cache_implementation") == "paged":
            self._refuse_continuous_batching()
        rolls_back = caches_roll_back() if drafts or asked_for("is_assistant") else nullcontext()
        with rolls_back, generation(self._runs.observers, self.model, args, kwargs):
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The hub's `generate_batch` (continuous batching) while the adapter is disabled, else a `ValueError`."""
        if self._active_plan() is not None:
            self._refuse_continuous_batching()
        return self.model.generate_batch(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        raise ValueError(
            "Continuous batching keeps the states of one model in its paged cache, and a stitched model has several. "
            "Use `generate()` with a left-padded batch, or disable the adapter to run the hub alone."
        )
