"""Workarounds for transformers' internals, written against 5.23.0.

The library collects `output_hidden_states` and `output_attentions` by hooks on layers, which add to the collector of
the backbone that is running (`utils/output_capturing.py`). It does not expect another backbone to run amid a
backbone's layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import cached_file
from transformers.utils.output_capturing import _active_collector

from .patching import function_of, replace_method


def call_first(kind: type[TrainerCallback]) -> None:
    """Have every Trainer call callbacks of this kind before all others.

    A Trainer calls its callbacks in the order in which they were added, its reporters (TensorBoard and the like)
    before the user's: what a user's callback adds to the logs would never reach them. Events hand a callback neither
    the Trainer nor the `CallbackHandler` that keeps the order, so the handler itself is taught it.

    It could be removed if callbacks could ask for a place in the order.
    """
    add = function_of(CallbackHandler, "add_callback")

    @functools.wraps(add)
    def add_callback(self: CallbackHandler, callback: TrainerCallback) -> None:
        add(self, callback)
        self.callbacks.sort(key=lambda added: not isinstance(added, kind))  # stable: the others stay in their order

    replace_method(CallbackHandler, "add_callback", add_callback)


def replace_captured_hidden_state(layer_output: Tensor, new: Tensor) -> None:
    """Let the hub's `output_hidden_states` hold what the next layer gets: the state behind the stitch.

    The hook that collects it sits on the decoder layer, inside of the stitch.

    It could be removed if a wrapper around a layer could take the layer's place in the collection.
    """
    # While torch.compile traces, the collector is a global: it cannot look into context variables.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    states = collected.get("hidden_states") if collected else None
    if states and states[-1] is layer_output:
        states[-1] = new


@contextmanager
def no_output_capture() -> Iterator[None]:
    """Keep an expert's layers out of the hub's `output_hidden_states` and `output_attentions`.

    An expert that was once asked for its hidden states still has the hooks, and would add its layers to the hub's.

    It could be removed if hooks were taken off again after the call that wanted them, or knew their backbone.
    """
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


@contextmanager
def when_models_are_made(told: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Call `told(model)` for every model whose modules have been made, before any weight is loaded into them.

    Models that are parts of others are told first.

    It could be removed if `from_pretrained` could leave out modules, or be asked to call somebody between the two.
    """
    post_init = function_of(PreTrainedModel, "post_init")

    @functools.wraps(post_init)
    def tell(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        told(self)

    replace_method(PreTrainedModel, "post_init", tell)
    try:
        yield
    finally:
        replace_method(PreTrainedModel, "post_init", post_init)


def is_mixture(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether this is a mixture of experts, a model whose experts' kernels can be chosen.

    It could be removed if `set_experts_implementation` had a public question beside it.
    """
    return isinstance(module, PreTrainedModel) and module._can_set_experts_implementation()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the layers of a model in training computed again in the backward pass (gradient checkpointing).

    It could be removed if the oldest supported version had the new name, and the newest one the old name for good.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def find_file(source: str, file: str, *, out_of_reach_is_none: bool = False, **where: Any) -> Optional[str]:
    """Find a file in a folder or in a repository, from where it is downloaded if need be.

    Args:
        source: Path of the folder, or id of the repository.
        file: Name of the file.
        out_of_reach_is_none: Return `None` also if the repository cannot be reached or is gated.
        **where: `revision`, `subfolder`.

    Returns:
        The file's path, or `None` if there is no such file.

    Raises:
        OSError: If the repository does not exist or, unless `out_of_reach_is_none`, cannot be reached.

    It could be removed if these arguments of `cached_file` were public.
    """
    return cached_file(
        source,
        file,
        **where,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=not out_of_reach_is_none,
        _raise_exceptions_for_connection_errors=not out_of_reach_is_none,
    )
