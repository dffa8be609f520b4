"""References to experts: where the weights of an expert are.

An expert is kept as a *reference*, a small dict:

    {"model": repo id or path, "revision": commit or branch, "subfolder": ..., "adapter": repo id or path of a LoRA,
     "base_revision": ..., "quantization_config": {...}, "config": {...}}

With an `adapter`, `revision` and `subfolder` are the adapter's, and `base_revision` is the model's. Only these keys
are read, so a config file can never make a loader run code. `config` is written when an expert is attached: the sizes
that its stitches were made for, which are compared with the expert that a later load finds. A reference can also say
where the expert is to be put on *this* machine (`device_map`, `max_memory`, `offload_folder`); that is never saved,
and not taken from a file.

A config that was downloaded is somebody else's word. It may name repositories on the Hugging Face Hub, but no path of
this machine (`RepoId`), and at most `MAX_DOWNLOADED` experts.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from pathlib import PurePath
from typing import Any, Optional, TypeGuard, Union

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils.hub import extract_commit_hash

from .places import from_file, without_mark


REFERENCE_KEYS = ("model", "revision", "subfolder", "adapter", "base_revision", "quantization_config", "config")
PLACEMENT_KEYS = ("device_map", "max_memory", "offload_folder")  # about this machine, so never in a file
MAX_DOWNLOADED = 64  # each expert is a whole model in memory; the paper has three
_NAME = re.compile(r"[A-Za-z0-9_]+")
_ATTRIBUTES = frozenset(vars(nn.Module()))  # torch assigns them, and then an expert of that name is in the way


Source = Union[str, dict[str, Any]]  # an id or a path, or a reference


class RepoId(str):
    """The `model` or `adapter` of a downloaded reference: looked up on the Hugging Face Hub, never on this disk."""


def is_repo_id(source: Optional[str]) -> TypeGuard[str]:
    """Return whether loaders would look for `source` on the Hugging Face Hub.

    That is so if it has the form of a repo id, and no such path exists here.
    """
    if source is None or os.path.exists(source):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def check_there(source: str) -> None:
    """Raise `ValueError` if `source` can only be a path, and no folder is there; asking the Hub would be in vain."""
    if os.path.isfile(source):
        raise ValueError(f"{source!r} is a file, expected a folder or an id on the Hub.")
    if not os.path.exists(source) and not is_repo_id(source):
        raise ValueError(f"there is no such folder as {source!r}.")


def check_expert_name(name: Any) -> None:
    """Check that `name` can be part of a tensor's key.

    Raises:
        ValueError: Unless it is made of letters, digits and `_` only, and is not `hub` or `training` (or another
            attribute that every module has).
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"Expert name {name!r} is not usable: it becomes part of tensor names, so it must be made of letters, "
            "digits and '_' only."
        )
    if name == "hub":
        raise ValueError("Expert name 'hub' is taken: it stands for the seed model. Choose another name.")
    if name in _ATTRIBUTES:
        raise ValueError(
            f"Expert name {name!r} is taken: every module of torch has an attribute of that name. Choose another name."
        )


def as_reference(name: str, value: Union[str, os.PathLike[str], dict[str, Any], None]) -> dict[str, Any]:
    """Turn one entry of `experts` into a reference dict.

    Args:
        name: The expert's name.
        value: A repo id, a path, a dict with some of the keys of a reference, or `None` for an unknown place.

    Raises:
        ValueError: If the name or the value is not usable.
    """
    check_expert_name(name)
    if value is None or isinstance(value, (str, os.PathLike)):
        return {"model": None if value is None else os.fspath(value)}
    if not isinstance(value, dict):
        raise ValueError(
            f"Expert {name!r} is a {type(value).__name__}, expected an id, a path or a dict with the keys "
            f"{', '.join(REFERENCE_KEYS)}. To use a loaded model, call `model.attach_expert({name!r}, loaded_model)` "
            "after `get_peft_model`."
        )
    known = REFERENCE_KEYS + PLACEMENT_KEYS
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"Expert {name!r} has the unknown key(s) {unknown}; a reference has only {', '.join(known)}.")
    reference = {key: os.fspath(part) if isinstance(part, os.PathLike) else part for key, part in value.items()}
    for key in ("model", "revision", "subfolder", "adapter", "base_revision"):
        if not isinstance(reference.get(key), (str, type(None))):
            raise ValueError(f"Expert {name!r} has {key}={reference[key]!r}; expected a string.")
    for key in ("revision", "subfolder", "base_revision"):  # parts of paths: in the local cache, and below `model`
        if _leads_out(reference.get(key)):
            raise ValueError(f"Expert {name!r} has {key}={reference[key]!r}, which leads out of its repository.")
    if not isinstance(reference.get("config"), (dict, type(None))):
        raise ValueError(
            f"Expert {name!r} has config={reference['config']!r}; expected a dict of the sizes that its stitches were "
            "made for, which is written when it is attached. Leave it out if you do not have them."
        )
    quantization: Any = reference.get("quantization_config")
    if hasattr(quantization, "to_dict"):
        reference["quantization_config"] = json.loads(quantization.to_json_string(use_diff=False))
    elif quantization is not None and not (isinstance(quantization, dict) and "quant_method" in quantization):
        raise ValueError(
            f"Expert {name!r} has quantization_config={quantization!r}; expected a config of transformers, such as "
            "BitsAndBytesConfig, or its dict with `quant_method`."
        )
    return reference


def without_placement(reference: Any) -> Any:
    """A reference without the keys that are about this machine; anything but a dict is returned as it is."""
    if not isinstance(reference, dict):
        return reference
    return {key: value for key, value in reference.items() if key not in PLACEMENT_KEYS}


def check_config_file(values: dict[str, Any], path: Union[str, os.PathLike[str]]) -> dict[str, Any]:
    """Keep those values of an adapter_config.json that its author may set (`_compat` has PEFT call this).

    Paths relative to the adapter's folder become absolute, unless the file was downloaded.

    Args:
        values: What the file says.
        path: Where the file is; in the cache of huggingface_hub if it was downloaded.

    Raises:
        ValueError: If it was downloaded and names a path of this machine as its seed, or has very many experts.
    """
    downloaded = extract_commit_hash(os.fspath(path), None) is not None
    values = without_mark(values) if downloaded else from_file(values, os.path.dirname(path))
    values = {"output": "hub", **values}  # files from before the option are of the paper's form
    experts = values.get("experts")
    if not isinstance(experts, dict):
        return values
    kept = {name: without_placement(reference) for name, reference in experts.items()}
    if kept != experts:
        warnings.warn(
            f"{path} says where to put experts ({', '.join(PLACEMENT_KEYS)}); this is ignored. Set it on the loaded "
            "config instead.",
            stacklevel=4,
        )
    if downloaded:
        vouch = (
            "If you trust it, make it your own: `hf download <its id> --local-dir <folder>`, edit adapter_config.json "
            "there if need be, and load the folder."
        )
        seed = values.get("base_model_name_or_path")
        if isinstance(seed, str) and os.path.exists(seed):
            raise ValueError(
                f"This downloaded adapter names {str(seed)!r} as its seed, which is a path of this machine. {vouch}"
            )
        if _leads_out(values.get("revision")):
            raise ValueError(f"This downloaded adapter has the seed's revision {values['revision']!r}. {vouch}")
        if len(kept) > MAX_DOWNLOADED:
            raise ValueError(
                f"This downloaded adapter has {len(kept)} experts; at most {MAX_DOWNLOADED} are loaded on somebody "
                f"else's word. {vouch}"
            )
        kept = {name: _with_repo_ids(reference) for name, reference in kept.items()}
    return {**values, "experts": kept}


def _leads_out(path: Optional[str]) -> bool:
    place = PurePath(path or "")
    return place.is_absolute() or ".." in place.parts


def _with_repo_ids(reference: Any) -> Any:
    if isinstance(reference, str):
        return RepoId(reference)
    if not isinstance(reference, dict):
        return reference
    sources = {key: RepoId(reference[key]) for key in ("model", "adapter") if isinstance(reference.get(key), str)}
    return {**reference, **sources}


def as_source(text: str) -> Source:
    """Read what names a model on the command line and in recipes: an id or path, `id@revision`, or JSON.

    Raises:
        ValueError: If it begins like JSON and is none, or has a key that references have not.
    """
    if text.startswith("{"):
        try:
            reference = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is no JSON: {error}") from error
        for key in reference:
            if key not in REFERENCE_KEYS + PLACEMENT_KEYS:
                near = difflib.get_close_matches(key, REFERENCE_KEYS, 1)
                raise ValueError(f"A reference has no key {key!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
        return dict(reference)
    if "@" in text and not os.path.exists(text):
        model, revision = text.rsplit("@", 1)
        return {"model": model, "revision": revision}
    return text
