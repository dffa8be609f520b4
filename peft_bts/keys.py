"""Between a model's tensors and those of an adapter file.

The file's keys are a contract: `...stitch_layer.gate.<model>.weight`, `...stitch_layer.proj.<expert>.weight` (and
`.bias`, `.down.weight`, `.up.weight`), `...stitch_output.gate.<model>.weight` (and `.bias`), and with evidence
`...stitch_output.evidence_weight`. In memory the adapter's name stands behind `stitch_layer` and `stitch_output`, and
`for_` before the model's.
"""

from __future__ import annotations

import re
from typing import Optional

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ._compat.peft import base_model
from .stitch import PerModel


_MODEL_KEY = re.compile(
    r"^(?P<layer>.*\.stitch_(?:layer|output))\.(?P<adapter>[^.]+)\."
    rf"(?:(?P<role>(?:gate|proj)\.){PerModel.PREFIX}(?P<rest>.+)|(?P<whole>evidence_weight))$"
)
_SHOWN = 10  # problems listed in an error
_ABOUT_EMBEDDINGS = (
    "Embedding layers of the hub are taken from a file only if the hub's vocabulary has been resized, which is to be "
    "done before loading, or if the config says that they were saved on request (`save_embedding_layers`)."
)


def is_stitch_weight(name: str) -> bool:
    """Return whether a parameter of a stitched model, by its name in memory, belongs to a stitch adapter."""
    return ".stitch_layer." in name or ".stitch_output." in name


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
    return f"{match['layer']}.{match['whole'] or match['role'] + match['rest']}"


def fit_to_model(
    model: PeftModel, adapter: str, file: dict[str, Tensor], *, with_embeddings: bool = False
) -> dict[str, Tensor]:
    """Translate the tensors of an adapter file to the keys and dtypes of the model.

    Only the adapter's own tensors are taken: its stitches, its `modules_to_save`, and the hub's embedding layers
    where PEFT was right to save them.

    Args:
        model: The model with the adapter.
        adapter: The adapter's name.
        file: The tensors of the file; those of `modules_to_save` under their keys in memory, as PEFT hands them over.
        with_embeddings: Whether the hub's embedding layers were saved on request. Those of a hub whose vocabulary has
            been resized are always taken, since PEFT saves them unasked.

    Raises:
        ValueError: Unless the file has exactly the tensors of this adapter, in their shapes.
    """
    full = model.state_dict()
    stitches = {shown: key for key in full if (shown := file_key(key, adapter)) is not None}
    needed = stitches | {key: key for key in _trained_copies(model, adapter)}
    embeddings = {key: where for key, where in _embedding_layers(model).items() if key in file and key not in needed}
    with_embeddings = with_embeddings or (bool(embeddings) and _is_resized(model))
    known: dict[str, Optional[str]] = {**embeddings, **needed} if with_embeddings else {**needed}
    taken = {key: where for key in file if (where := known.get(key)) is not None}
    problems = [f"missing: {key}" for key in needed if key not in file]
    problems += [f"not part of this adapter: {key}" for key in file if key not in known]
    problems += [
        f"{key} has shape {tuple(file[key].shape)}, expected {tuple(full[where].shape)}"
        for key, where in taken.items()
        if file[key].shape != full[where].shape
    ]
    if problems:
        raise _refusal(adapter, problems, [_ABOUT_EMBEDDINGS] if embeddings and not with_embeddings else [])
    # Cast here: with low_cpu_mem_usage the tensors themselves become the weights.
    return {
        where: file[key].to(full[where].dtype) if key in stitches or key in embeddings else file[key]
        for key, where in taken.items()
    }


def check_trained_copies(model: nn.Module, adapter: str, file: dict[str, Tensor]) -> None:
    """Check that a file has all tensors of `modules_to_save`, under its own keys.

    PEFT looks these up before it asks a tuner, and would have a `KeyError` for the first that is missing.

    Raises:
        ValueError: If one is missing.
    """
    problems = [f"missing: {key}" for key in _trained_copies(model, adapter).values() if key not in file]
    if problems:
        raise _refusal(adapter, problems, [])


def _refusal(adapter: str, problems: list[str], advice: list[str]) -> ValueError:
    """Return the error that lists what is wrong with the tensors of a file."""
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return ValueError(
        f"The weights do not fit stitch adapter {adapter!r} ({len(problems)} problems):\n  "
        + "\n  ".join(problems[:_SHOWN] + more + advice)
        + "\nThe file and the config (experts, num_stitches, gate, r, ...) must be of the same adapter; nothing "
        "was loaded."
    )


def _trained_copies(model: nn.Module, adapter: str) -> dict[str, str]:
    """Tensors of modules that PEFT trains and saves with this adapter, as asked: key in memory -> key in the file."""
    return {
        f"{path.removeprefix('_fsdp_wrapped_module.')}.{key}": f"{path.removeprefix('_fsdp_wrapped_module.')}.{shown}"
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for shown, key in module.adapter_state_dict_load_map(adapter).items()
    }


def _embedding_layers(model: PeftModel) -> dict[str, Optional[str]]:
    """Keys that PEFT saves the hub's embedding layers under -> keys in memory.

    Beside an embedding layer that is trained (`modules_to_save`), PEFT saves its trained copy once more, under a key
    that nothing in memory has: `None`.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    keys: dict[str, Optional[str]] = {}
    for path, module in model.named_modules():
        if not any(module is layer for layer in layers):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys |= {f"{path}.modules_to_save.{key}": None for key in module.original_module.state_dict()}
            path, module = f"{path}.original_module", module.original_module
        keys |= {f"{path}.{key}": f"{path}.{key}" for key in module.state_dict()}
    return keys


def _is_resized(model: PeftModel) -> bool:
    """Return whether the hub's vocabulary differs from its checkpoint's: PEFT's rule for saving embedding layers."""
    hub = base_model(model)
    try:
        saved = type(hub.config).from_pretrained(hub.name_or_path or "")
    except (OSError, ValueError):  # it came from nowhere, or is out of reach
        return False
    return saved.get_text_config().vocab_size != hub.config.get_text_config().vocab_size
