"""What quantisation by bitsandbytes makes of a model's weights, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from .._compat.peft import CausalLM, base_model


Quantization = Literal["4bit", "8bit"]
QUANTIZATIONS: tuple[Quantization, ...] = ("4bit", "8bit")
_BLOCK = 64  # weights that share a scale, in 4 bits
_CODE = 16 * 4  # what the 4-bit numbers stand for, kept with every weight


def saved_bytes(models: Iterable[CausalLM], quantization: Quantization) -> int:
    """Return by how much models get smaller if they are loaded in 4 bits (without double quantisation) or in 8.

    Weights that several models share count once. LoRA weights, embeddings and heads stay as they are.

    Args:
        models: The models as they are without, real ones or blueprints.
        quantization: `"4bit"` or `"8bit"`.
    """
    weights = {id(weight): (weight, outputs) for model in models for weight, outputs in _quantized(model)}
    return sum(weight.nbytes - _bytes(weight, outputs, quantization) for weight, outputs in weights.values())


def _quantized(model: CausalLM) -> Iterable[tuple[Tensor, int]]:
    """The weights that are quantised, each with its number of outputs."""
    plain = base_model(model) if isinstance(model, PeftModel) else model
    spared = tuple(get_keys_to_not_convert(plain))
    for path, module in plain.named_modules():
        path = path.removesuffix(".base_layer")
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and path not in spared and ".lora_" not in path:
            yield module.weight, module.weight.shape[1 if isinstance(module, Conv1D) else 0]


def _bytes(weight: Tensor, outputs: int, quantization: Quantization) -> int:
    if quantization == "8bit":
        return weight.numel() + 4 * outputs  # and a scale for each of them
    return -(-weight.numel() // 2) + 4 * -(-weight.numel() // _BLOCK) + _CODE
