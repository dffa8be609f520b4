"""Between a model's tensors and those of an adapter file.

The file's keys are a contract: `...stitch_layer.gate.<model>.weight`, `...stitch_layer.proj.<expert>.weight` (and
`.bias`, `.down.weight`, `.up.weight`). In memory the adapter's name stands behind `stitch_layer`, and `for_` before
the model's.
"""

from __future__ import annotations

import re
from typing import Optional

from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .stitch import PerModel


_MODEL_KEY = re.compile(
    r"^(?P<layer>.*\.stitch_layer)\.(?P<adapter>[^.]+)\.(?P<role>gate|proj)\." + PerModel.PREFIX + r"(?P<rest>.+)$"
)
_SHOWN = 10  # problems listed in an error


def stitch_weights(state_dict: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The stitch weights of one adapter, under their keys in memory: never an expert's or the hub's weights."""
    return {key: tensor for key, tensor in state_dict.items() if file_key(key, adapter)}


def file_key(key: str, adapter: str) -> Optional[str]:
    """The key in the adapter file of a stitch weight of this adapter; `None` for any other key.

    `...stitch_layer.<adapter>.gate.for_code.weight` -> `...stitch_layer.gate.code.weight`
    """
    match = _MODEL_KEY.match(key)
    if match is None or match["adapter"] != adapter:
        return None
    return f"{match['layer']}.{match['role']}.{match['rest']}"


def fit_to_model(model: nn.Module, adapter: str, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the tensors of an adapter file to the keys and dtypes of the model.

    Raises:
        ValueError: Unless the file has exactly the tensors of this adapter, in their shapes.
    """
    full = model.state_dict()
    model_key = {file_key(key, adapter): key for key in stitch_weights(full, adapter)}
    # Besides stitches a file may hold what the user asked PEFT to save: modules_to_save, resized embeddings.
    auxiliary = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    stitches = {
        key: tensor
        for key, tensor in file.items()
        if not (auxiliary and key.startswith(auxiliary))
        and not (key in full and key.split(".")[-2] in EMBEDDING_LAYER_NAMES)
    }
    problems = [f"missing: {key}" for key in model_key if key not in stitches]
    problems += [f"not part of this adapter: {key}" for key in stitches if key not in model_key]
    problems += [
        f"{key} has shape {tuple(tensor.shape)}, expected {tuple(full[model_key[key]].shape)}"
        for key, tensor in stitches.items()
        if key in model_key and tensor.shape != full[model_key[key]].shape
    ]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError(
            f"The weights do not fit stitch adapter {adapter!r} ({len(problems)} problems):\n  "
            + "\n  ".join(problems[:_SHOWN] + more)
            + "\nThe file and the config (experts, num_stitches, gate, r, ...) must be of the same adapter; nothing "
            "was loaded."
        )
    # Cast here: with low_cpu_mem_usage the tensors themselves become the weights.
    return {
        model_key.get(key, key): tensor.to(full[model_key[key]].dtype) if key in model_key else tensor
        for key, tensor in file.items()
    }
