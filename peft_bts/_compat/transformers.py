"""What is done about transformers' insides (5.23.0).

transformers collects `output_hidden_states` and `output_attentions` by hooks on layers, which add to the collector of
the backbone that is running (`utils/output_capturing.py`). It does not expect another backbone to run amid a
backbone's layers.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils.output_capturing import _active_collector


def first_callback(callback: TrainerCallback) -> None:
    """Put a callback of a Trainer before all others; called from one of the callback's own events.

    Reporters such as TensorBoard's come first otherwise, and never see what a later callback adds to the logs. Only
    the handler knows the order, and it does not say who it is: it is looked for among the calls on the stack.
    """
    frame = sys._getframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back


def replace_captured_hidden_state(layer_output: Tensor, new: Tensor) -> None:
    """Let the hub's `output_hidden_states` hold what the next layer gets: the state behind the stitch.

    The hook that collects it sits on the decoder layer, inside of the stitch.

    Could go if a wrapper around a layer could take the layer's place in the collection.
    """
    # While torch.compile traces, the collector is a global: it cannot look into context variables.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    states = collected.get("hidden_states") if collected else None
    if states and states[-1] is layer_output:
        states[-1] = new


@contextmanager
def keep_output_capture():
    """Run another backbone amid the hub's without ending the hub's capture.

    Backbones set and reset the collector. That nests, except while torch.compile traces, where a reset ends all.

    Could go if `CompileableContextVar.reset` went back to the value before, as a context variable's does.
    """
    if not torch.compiler.is_compiling():
        yield
        return
    saved = _active_collector.global_var, _active_collector.compiling
    try:
        yield
    finally:
        _active_collector.global_var, _active_collector.compiling = saved


@contextmanager
def no_output_capture():
    """Keep an expert's layers out of the hub's `output_hidden_states` and `output_attentions`.

    An expert that was once asked for its hidden states still has the hooks, and would add its layers to the hub's.

    Could go if hooks were taken off again after the call that wanted them, or knew their backbone.
    """
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)
