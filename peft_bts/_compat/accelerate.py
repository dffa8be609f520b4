"""Adaptations to accelerate's insides (1.15.0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .patching import function_of, replace_method


# Taken at import, before anybody's `init_empty_weights` can have replaced them.
_REGISTER = {name: function_of(nn.Module, name) for name in ("register_parameter", "register_buffer")}


@contextmanager
def real_weights() -> Iterator[None]:
    """Allocate real memory inside accelerate's `init_empty_weights`.

    With `low_cpu_mem_usage=True` PEFT makes an adapter inside of it: `nn.Module.register_parameter` is patched to send
    every new parameter to the meta device. Experts are loaded meanwhile, and they need their weights.

    It could be removed if PEFT used `init_empty_weights` around the making of adapter layers only.
    """
    patched = {name: function_of(nn.Module, name) for name in _REGISTER}
    _put(_REGISTER)
    try:
        yield
    finally:
        _put(patched)


def _put(methods: dict[str, Callable[..., Any]]) -> None:
    for name, method in methods.items():
        replace_method(nn.Module, name, method)


def offloaded_weights(module: nn.Module) -> list[Any]:
    """The maps in which accelerate's hook on a module keeps weights that are on the CPU or on disk.

    It could be removed if `copy.deepcopy` of an offloaded model shared what is not in memory.
    """
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    found = [getattr(one, name, None) for one in hooks for name in ("weights_map", "tied_params_map")]
    return [weights for weights in found if weights is not None]
