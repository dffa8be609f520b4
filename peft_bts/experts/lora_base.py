"""Does a LoRA run on the model that it was trained on?

Its config says which model that was; PEFT loads it onto any model of the same shape, and a layer too few or too many
is no obstacle either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Optional

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from .._compat.peft import base_model, peft_type_name
from ..reference import is_repo_id


_COMMIT = re.compile("[0-9a-f]{40}")
_IN_CACHE = re.compile(r"models--(.+?)[/\\]snapshots[/\\]")
_INITS = ("gaussian", "orthogonal", "mica", "eva")  # beside True and False: those that leave the base as it is
_OWN_BASE = 'Load it onto a model of its own: {"model": its base, "adapter": this one}.'
_LAYER = re.compile(r"\.(\d+)\.")


def another_base(name: str, expert: PeftModel) -> tuple[Optional[str], Optional[str]]:
    """Compare what an expert's adapter says of its base with the model that it is on.

    Args:
        name: The expert's name.
        expert: The model with the adapter.

    Returns:
        An error, where that is proven to be another model; a warning, where it looks so. `None` for what there is not.
    """
    config, base = expert.peft_config[expert.active_adapter], base_model(expert)
    made_for, found = config.base_model_name_or_path, getattr(base, "name_or_path", "")
    if not made_for or not found:
        return None, None
    kind = peft_type_name(expert.peft_type)
    if not same_source(made_for, found):
        return None, (
            f"Expert {name!r} is a {kind} adapter of {made_for!r}, as its config says, and runs on {found!r} here. "
            "Unless these are the same weights, its outputs are wrong: give its own base as `model`, beside `adapter`."
        )
    commits = config.revision or "", extract_commit_hash(os.path.join(found, "config.json"), None) or ""
    if commits[0] != commits[1] and all(map(_COMMIT.fullmatch, commits)):
        return (
            f"Expert {name!r} is a {kind} adapter of {made_for!r} at commit {commits[0]}, as its config says, and the "
            f"model here is of commit {commits[1]}. Load the adapter's commit, or give its own base as `model` and "
            "`base_revision`, beside `adapter`."
        ), None
    return None, None


def same_source(one: str, other: str) -> bool:
    """Return whether two ids or paths name the same model, as far as names tell.

    A folder is a copy of `org/name` if it is the repository's in the cache, or is called `name`.
    """
    if one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)):
        return True
    names = [_repository(source) for source in (one, other)]
    if names[0] == names[1]:
        return True
    for repository, folder in (names, reversed(names)):
        if is_repo_id(repository) and not is_repo_id(folder):
            return PurePath(folder).name == repository.rpartition("/")[2]
    return False


def _repository(source: str) -> str:
    """The id of what lies in the cache of the Hugging Face Hub; anything else is returned as it is."""
    match = _IN_CACHE.search(source + os.sep)
    return source if match is None else match[1].replace("--", "/")


def check_layers(expert: PeftModel, adapter_file: str) -> None:
    """Raise `ValueError` unless an adapter's file has weights for just those layers that have the adapter here.

    Args:
        expert: The model with the adapter.
        adapter_file: The adapter's weights, a safetensors file.
    """
    prefix = str(expert.base_model.prefix)
    with safe_open(adapter_file, "pt") as file:
        there = _layers(file.keys(), prefix)
    here = _layers((name for name, _ in expert.named_parameters()), prefix)
    if there != here:
        raise ValueError(
            f"it is an adapter of another model: it has weights for the layers {_ranges(there)}, and on this model it "
            f"would need them for {_ranges(here)}."
        )


def check_leaves_base_alone(
    base: PreTrainedModel, config: PeftConfig, keys: Iterable[str], tensor_of: Callable[[str], Tensor]
) -> None:
    """Raise `ValueError` for an adapter that would change the weights of the model that it is loaded onto.

    Args:
        base: That model, whose weights others use as well.
        config: The adapter's config.
        keys: Those of the adapter's file.
        tensor_of: Reads the tensor of a key.
    """
    init = getattr(config, "init_lora_weights", True)
    if not (isinstance(init, bool) or init in _INITS) or getattr(config, "kasa_config", None) is not None:
        how = "kasa_config" if isinstance(init, bool) or init in _INITS else f"init_lora_weights={init!r}"
        raise ValueError(f"its {how} changes the weights of its base, which are the hub's. {_OWN_BASE}")
    weights = dict((*base.named_parameters(), *base.named_buffers()))
    copies = tuple(getattr(config, "modules_to_save", None) or ())
    for key in keys:
        name = key.removeprefix("base_model.model.")
        place = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if place not in weights or (place == name and name.rpartition(".")[0].endswith(copies)):
            continue
        there, tensor = weights[place], tensor_of(key)
        same = not there.is_meta and there.shape == tensor.shape
        if not (same and torch.equal(there.detach().to("cpu", tensor.dtype), tensor)):
            raise ValueError(f"it has a value of its own for {place}, which is a weight of the hub. {_OWN_BASE}")


def _layers(keys: Iterable[str], prefix: str) -> set[int]:
    found = (_LAYER.search(key) for key in keys if prefix in key)
    return {int(match[1]) for match in found if match is not None}


def _ranges(numbers: set[int]) -> str:
    """`{0, 1, 2, 5}` as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"
