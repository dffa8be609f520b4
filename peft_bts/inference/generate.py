"""`generate()` of a stitched model: the hub's, which knows nothing of the experts. What they cannot do is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, Optional

from ..forward.cache import caches_roll_back
from ..forward.composition import Composition
from ..forward.observers import Observer, observed_generation


def generate(
    hub: Any,
    composition: Optional[Composition],
    observers: Sequence[Observer],
    dropping: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call the hub's `generate`.

    Args:
        hub: The hub, with stitches around its layers.
        composition: What takes part; `None` for the hub alone.
        observers: Told of the call.
        dropping: Whether experts may be left out meanwhile.
        args, kwargs: The arguments of the call.

    Raises:
        ValueError: For what some expert cannot do, see `StitchModel.generate`.
    """
    configs = [kwargs.get("generation_config"), *args[1:2], hub.generation_config]

    def asked_for(option: str) -> Any:
        given = [kwargs.get(option), *(getattr(config, option, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    drafts = kwargs.get("assistant_model") is not None or asked_for("prompt_lookup_num_tokens")
    if composition is not None and drafts:
        _check_drafts(composition)
    if composition is not None and dropping:
        refused = {
            "num_beams": asked_for("num_beams") not in (None, 1),
            "assistant_model or prompt_lookup_num_tokens": drafts,
            "cache_implementation": asked_for("cache_implementation") not in (None, "dynamic"),
            "use_cache=False": asked_for("use_cache") is False,
        }
        found = next((name for name, is_so in refused.items() if is_so), None)
        if found is not None:
            raise ValueError(
                f"Experts cannot be left out while generating with {found}: sequences can only be continued, with "
                "a DynamicCache. Generate without it, or without max_active_experts and expert_threshold."
            )
    if composition is not None and asked_for("cache_implementation") == "paged":
        refuse_continuous_batching()
    rolls_back = caches_roll_back() if drafts or asked_for("is_assistant") else nullcontext()
    with rolls_back, observed_generation(observers, hub, args, kwargs):
        return hub.generate(*args, **kwargs)


def _check_drafts(composition: Composition) -> None:
    for name, expert in composition.experts.items():
        if expert.is_stateful:
            raise ValueError(
                f"Drafts have to be taken back where they were wrong, and expert {name!r} "
                f"({expert.config.model_type}) is stateful: it cannot. Generate without `assistant_model` and "
                "`prompt_lookup_num_tokens`, or leave the expert out (`set_active_experts`)."
            )


def refuse_continuous_batching() -> NoReturn:
    """Raise the `ValueError` that says what to do instead."""
    raise ValueError(
        "Continuous batching keeps the states of one model in its paged cache, and a stitched model has several. "
        "Use `generate()` with a left-padded batch, or disable the adapter to run the hub alone."
    )
