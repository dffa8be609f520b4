"""Mistakes of calls over several processes, found before they do harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from torch import Tensor
from transformers import Cache, QuantizedCache

from ..config import StitchConfig
from .processes import Processes


INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")  # which the backbone does not get


def check_config(config: StitchConfig) -> None:
    """Raise `ValueError` for options of an adapter that need all of the models in one process."""
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save} is not supported under expert_parallel(): the hub is not "
            "in all processes. Train the stitches alone, or run one process."
        )
    if config.gate_dropout:
        raise ValueError(
            f"gate_dropout={config.gate_dropout} is not supported under expert_parallel(): the processes would drop "
            "different gates. Set it to 0."
        )


def check_call(call: Mapping[str, Any], cache: Optional[Cache], hub_config: Any) -> None:
    """Raise `ValueError` for what a forward over several processes cannot do.

    Args:
        call: The arguments of the hub's backbone by name.
        cache: The hub's cache.
        hub_config: The hub's text config.
    """
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        given = call.get(name)
        if getattr(hub_config, name, False) if given is None else given:
            raise ValueError(
                f"{name} is not supported under expert_parallel(): no process has all layers of all models."
            )
    embeds = call.get("inputs_embeds")
    if embeds is not None and embeds.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inputs_embeds requires gradients, which expert_parallel() does not have: no process runs all models. "
            "Train the stitches alone, or run one process."
        )
    if isinstance(cache, QuantizedCache) or getattr(cache, "offloading", False):
        raise ValueError(
            "Quantised and offloaded caches are not supported under expert_parallel(); use a DynamicCache or a "
            "StaticCache."
        )


def check_same_inputs(
    processes: Processes, inputs: Mapping[str, Any], modes: Mapping[str, bool], settings: Mapping[str, Any]
) -> None:
    """Compare the inputs of all processes, tensors by a checksum of each, and how they are called.

    Args:
        processes: The processes.
        inputs: What to compare, by name; anything but tensors and numbers is left out.
        modes: What else must be the same, on or off, by name.
        settings: What else must be the same (small, picklable), by name.

    Raises:
        RuntimeError: In all processes, if they differ; the message says where.
    """
    mine = {name: _comparable(value) for name, value in inputs.items() if isinstance(value, (Tensor, int, float))}
    modes = {"gradients": torch.is_grad_enabled(), **modes}
    everybodys, everybodys_modes, everybodys_settings = zip(*processes.everybodys((mine, modes, {**settings})))
    for name in modes:
        on = [rank for rank, found in zip(processes.ranks, everybodys_modes) if found.get(name)]
        if on and len(on) < processes.size:
            raise RuntimeError(
                f"The processes of one stitched model were called in different ways: {name} is on in process "
                f"{', '.join(map(str, on))} only. All processes of the expert axis must make the same calls "
                "(docs/distributed.md)."
            )
    for name in settings:
        found = [theirs.get(name) for theirs in everybodys_settings]
        if any(one != found[0] for one in found):
            values = "; ".join(f"process {rank} has {one!r}" for rank, one in zip(processes.ranks, found))
            raise RuntimeError(
                f"The processes of one stitched model were called in different ways: not all have the same {name}: "
                f"{values}. All processes of the expert axis must make the same calls (docs/distributed.md)."
            )
    for name in sorted({name for sums in everybodys for name in sums}):
        found = [sums.get(name) for sums in everybodys]
        others = [rank for rank, one in zip(processes.ranks, found) if one != found[0]]
        if others:
            shapes = [one[0] if isinstance(one, tuple) else one for one in found]
            raise RuntimeError(
                f"The processes of one stitched model were called with different {name}: process "
                f"{', '.join(map(str, others))} has other ones than process {processes.ranks[0]} (shapes {shapes}). "
                "All processes of the expert axis must get the same inputs, in the same order; only over the data "
                "axis may they differ (docs/distributed.md)."
            )


def _comparable(value: Union[Tensor, int, float]) -> Any:
    return checksum(value) if isinstance(value, Tensor) else value


def checksum(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """A tensor's shape, and a number that another content would most likely not have."""
    flat = tensor.detach().contiguous().view(-1)
    numbers = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    weights = torch.arange(1, len(numbers) + 1, device=flat.device) * 0x9E3779B1 | 1
    return tuple(tensor.shape), int((numbers * weights).sum())
