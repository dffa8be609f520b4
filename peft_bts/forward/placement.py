"""Where things are: devices and dtypes of models that may be spread over devices, memory and disk by accelerate."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn


def execution_device(module: nn.Module) -> Optional[torch.device]:
    """Return where accelerate runs a module whose weights it keeps elsewhere; `None` if it does not."""
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(h, "execution_device", None) for h in (*getattr(hook, "hooks", ()), hook)]
    found = next((device for device in devices if device is not None), None)
    return found if found is None else torch.device(found)


def is_dispatched(model: nn.Module) -> bool:
    """Return whether accelerate has spread a model over several places: its parts must not be moved."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or any(
        parameter.device.type == "meta" for parameter in model.parameters()
    )


def place_for_stitch(base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for a stitch behind this layer: those of the layer's first floating-point weight.

    Behind an offloaded layer (meta device) the stitch itself is not offloaded: it is where the layer is run.
    """
    like: nn.Module = getattr(base_layer, "placed_like", base_layer)  # a layer that another process runs tells by this
    for module in like.modules():
        for tensor in module.parameters(recurse=False):
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2:
                on_meta = tensor.device.type == "meta"
                return (execution_device(module) or torch.device("cpu")) if on_meta else tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
