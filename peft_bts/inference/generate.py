"""`generate()` of a stitched model: the hub's, which knows nothing of the experts. What they cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, Optional

from ..experts.weight_sharing import share_weights
from ..forward.cache import caches_roll_back
from ..forward.composition import Composition
from ..forward.observers import Observer, observed_generation


DRAFT_TOKENS = 2  # that the hub drafts, unless `num_assistant_tokens` is given: the best of benchmarks/drafts.py
_OWN_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")  # that need no other model
_DRAFT_OPTIONS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


def generate(
    hub: Any,
    composition: Optional[Composition],
    observers: Sequence[Observer],
    dropping: bool,
    draft: Optional[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call the hub's `generate`.

    Args:
        hub: The hub, with stitches around its layers.
        composition: What takes part; `None` for the hub alone.
        observers: Told of the call.
        dropping: Whether experts may be left out meanwhile.
        draft: `"hub"`: the hub alone drafts tokens; `None` for no drafts but those that the arguments ask for.
        args, kwargs: The arguments of the call.

    Raises:
        ValueError: For what some expert cannot do, see `StitchModel.generate`.
    """
    configs = [kwargs.get("generation_config"), *args[1:2], hub.generation_config]

    def asked_for(option: str) -> Any:
        given = [kwargs.get(option), *(getattr(config, option, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    others_draft = kwargs.get("assistant_model") is not None or any(map(asked_for, _OWN_DRAFTS))
    _check_draft(draft, others_draft)
    if draft is not None and composition is None:
        draft = None  # the hub would draft for itself
    cached = kwargs.get("past_key_values")
    if draft is not None and cached is not None and cached.get_seq_length() > 0:
        raise ValueError(
            "draft='hub' starts with an empty cache: with that of earlier turns, transformers gives wrong tokens. "
            "Leave out `draft`, or `past_key_values`."
        )
    drafts = others_draft or draft
    if composition is not None and drafts:
        _check_drafts(composition)
    if composition is not None and composition.forgetting is not None and asked_for("is_assistant"):
        raise ValueError(
            "A model whose output gates go by evidence cannot draft for another one: its drafts have to be taken back "
            "where they were wrong. Take the hub alone as the assistant, or an adapter without `evidence`."
        )
    if composition is not None and dropping:
        refused = {
            "num_beams": asked_for("num_beams") not in (None, 1),
            "drafts (draft, assistant_model or prompt_lookup_num_tokens)": drafts,
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
    if draft is not None and composition is not None:
        kwargs = {**kwargs, "assistant_model": _drafting_hub(hub, composition.adapter, asked_for)}
    rolls_back = caches_roll_back() if drafts or asked_for("is_assistant") else nullcontext()
    with rolls_back, observed_generation(observers, hub, args, kwargs):
        return hub.generate(*args, **kwargs)


def _check_draft(draft: Optional[str], others: bool) -> None:
    if draft not in (None, "hub"):
        raise ValueError(f"draft must be 'hub' or None, got {draft!r}. For another model, pass `assistant_model`.")
    if draft is not None and others:
        raise ValueError(
            "draft='hub' cannot be combined with `assistant_model` or `prompt_lookup_num_tokens`: only one can draft. "
            "Leave one of them out."
        )


def _drafting_hub(hub: Any, adapter: str, asked_for: Callable[[str], Any]) -> Any:
    """The hub without stitches, as an assistant that drafts: other modules around the very same weights."""
    twin = share_weights(hub, adapter)
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.num_assistant_tokens = DRAFT_TOKENS
    twin.generation_config.assistant_confidence_threshold = 0.0  # so few drafts need not end early
    for option in _DRAFT_OPTIONS:
        if asked_for(option) is not None:
            setattr(twin.generation_config, option, asked_for(option))
    return twin


def _check_drafts(composition: Composition) -> None:
    if composition.forgetting is not None:
        raise ValueError(
            "Drafts have to be taken back where they were wrong, and output gates with evidence cannot do that. "
            f"Generate without `draft`, `assistant_model` and `{'`, `'.join(_OWN_DRAFTS)}`."
        )
    for name, expert in composition.experts.items():
        if expert.is_stateful:
            raise ValueError(
                f"Drafts have to be taken back where they were wrong, and expert {name!r} "
                f"({expert.config.model_type}) is stateful: it cannot. Generate without `draft`, "
                "`assistant_model` and `prompt_lookup_num_tokens`, or leave the expert out (`set_active_experts`)."
            )


def refuse_continuous_batching() -> NoReturn:
    """Raise the `ValueError` that says what to do instead."""
    raise ValueError(
        "Continuous batching keeps the states of one model in its paged cache, and a stitched model has several. "
        "Use `generate()` with a left-padded batch, or disable the adapter to run the hub alone."
    )
