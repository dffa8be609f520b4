"""A second module tree over a model's weights: no memory but that of its objects."""

from __future__ import annotations

import copy
import types
from typing import Any, Optional

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._compat.accelerate import offloaded_weights
from .._compat.bitsandbytes import quantization_states
from ..forward.hooks import InstanceForward
from ..forward.layer import StitchLayer
from ..modules import M


def share_weights(hub: M, adapter: Optional[str] = None) -> M:
    """Copy a model's modules around its own parameters and buffers, without stitches and hooks.

    A LoRA injected into the copy costs only the LoRA's weights, and leaves the hub alone.

    Args:
        hub: The model.
        adapter: Take the `modules_to_save` of this adapter instead of the original modules.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*hub.parameters(), *hub.buffers())}
    for module in hub.modules():
        memo |= {id(kept): kept for kept in (*quantization_states(module), *offloaded_weights(module))}
        # Hooks are bound to their owners, the tuner with all experts among them; the copy gets none.
        hooks = [value for name, value in vars(module).items() if name.startswith("_forward_") and "hooks" in name]
        memo |= {id(registered): type(registered)() for registered in hooks}
        # So are stitched forwards and layers; they are taken out of the copy below.
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, InstanceForward)}
    twin = copy.deepcopy(hub, memo)
    twin.__dict__.pop("peft_config", None)
    twin._modules.pop("stitch_output", None)
    twin.__dict__.pop("hf_device_map", None)  # PEFT would have accelerate place the shared weights a second time
    for path, module in reversed(list(twin.named_modules())):  # from the inside out: paths stay true
        _restore_forward(module, memo)
        if isinstance(module, StitchLayer):
            _set_module(twin, path, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            trained = getattr(module, "modules_to_save", {})
            _set_module(twin, path, dict(trained).get(adapter, module.original_module))
    return twin


def _restore_forward(module: nn.Module, memo: dict[int, Any]) -> None:
    for name in ("forward", "_old_forward"):  # the latter where accelerate has wrapped the former
        stitched = vars(module).get(name)
        if isinstance(stitched, InstanceForward):
            before = copy.deepcopy(stitched.wrapped, memo)
            setattr(module, name, before or types.MethodType(type(module).forward, module))


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
