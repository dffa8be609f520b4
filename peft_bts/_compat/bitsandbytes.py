"""Adaptations to bitsandbytes' insides (0.50.2). The library itself is optional, and not imported here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .peft import CausalLM


def keep_repacked_weights(model: nn.Module) -> None:
    """Have `model.state_dict()` leave 4-bit weights alone that bitsandbytes has repacked for the CPU.

    It repacks them at their first forward in eval mode. For a state dict it packs them back, so badly that the model
    computes something else afterwards. PEFT takes a state dict of everything whenever it saves, and keeps the
    adapter's part of it. Experts are in eval mode even in training, so a checkpoint would spoil the rest of it.

    It could be removed if packing back gave the original weights (`_convert_weight_packed_for_cpu_inverse`).
    """
    model.register_state_dict_pre_hook(_hide_repacking)
    model.register_state_dict_post_hook(_show_repacking)


def _hide_repacking(model: nn.Module, *_: Any) -> None:
    states: list[Any] = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    hidden = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    model.__dict__["_hidden_repacking"] = hidden
    for state in hidden:
        state.packing_format_for_cpu = False


def _show_repacking(model: nn.Module, *_: Any) -> None:
    for state in model.__dict__.pop("_hidden_repacking", ()):
        state.packing_format_for_cpu = True


def saves_repacked_weights(model: CausalLM) -> bool:
    """Return whether saving 4-bit weights would go wrong: on a CPU, where they may have been repacked (see above)."""
    return bool(getattr(model, "is_loaded_in_4bit", False)) and model.device.type == "cpu"


def num_weights(weight: Tensor) -> int:
    """The number of weights in a parameter. bitsandbytes packs two of four bits into a byte.

    It could be removed if a 4-bit parameter told its unpacked shape itself.
    """
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def quantization_states(module: nn.Module) -> list[Any]:
    """Return what a quantised linear layer keeps beside its parameters, such as the scales of its weights.

    It could be removed if it were made of buffers.
    """
    return [vars(module)[name] for name in ("quant_state", "state") if vars(module).get(name) is not None]
