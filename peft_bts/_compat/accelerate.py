"""What is done about accelerate's insides (1.15.0)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch import nn


# Taken at import, before anybody's `init_empty_weights` can have replaced them.
_REGISTER_PARAMETER = nn.Module.register_parameter
_REGISTER_BUFFER = nn.Module.register_buffer


@contextmanager
def real_weights():
    """Allocate real memory inside accelerate's `init_empty_weights`.

    With `low_cpu_mem_usage=True` PEFT makes an adapter inside of it: `nn.Module.register_parameter` is patched to send
    every new parameter to the meta device. Experts are loaded meanwhile, and they need their weights.

    Could go if PEFT used `init_empty_weights` around the making of adapter layers only.
    """
    patched = nn.Module.register_parameter, nn.Module.register_buffer
    nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER_PARAMETER, _REGISTER_BUFFER
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = patched


def offloaded_weights(module: nn.Module) -> list[Any]:
    """The maps in which accelerate's hook on a module keeps weights that are on the CPU or on disk.

    Could go if `copy.deepcopy` of an offloaded model shared what is not in memory.
    """
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    found = [getattr(one, name, None) for one in hooks for name in ("weights_map", "tied_params_map")]
    return [weights for weights in found if weights is not None]
