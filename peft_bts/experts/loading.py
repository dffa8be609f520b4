"""From a reference to an expert: find it and load it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import extract_commit_hash

from .._compat.accelerate import real_weights
from .._compat.peft import CausalLM, adapters_where_layers_run, peft_type_name
from .._compat.transformers import find_file
from ..forward.placement import is_dispatched, place_for_stitch
from ..reference import PLACEMENT_KEYS, RepoId, as_reference, check_there, is_repo_id
from .lora_base import check_layers, check_leaves_base_alone
from .weight_sharing import share_weights


MAX_LAYERS = 4096  # of an expert that is described by its config alone; the deepest models have some hundreds
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_find = functools.partial(find_file, out_of_reach_is_none=True)  # what loads the file says why it is not there


def resolve_reference(name: str, reference: Any) -> dict[str, Any]:
    """Find out what a reference leaves open: the commit that an id stands for now, and whether it is an adapter.

    Raises:
        ValueError: If it says nothing, or nothing is there.
    """
    reference = as_reference(name, reference)
    source = reference.get("adapter") or reference.get("model")
    if source is None:
        raise ValueError(
            f"Expert {name!r} has no reference: it was attached as a model object that came from no id or path. "
            + how_to_replace(name)
        )
    for key in ("model", "adapter"):
        if isinstance(reference.get(key), RepoId) and not is_repo_id(reference[key]):
            raise ValueError(
                f"Expert {name!r} of this downloaded adapter refers to {str(reference[key])!r}, a path of this "
                f"machine; only repo ids are followed from a downloaded file. {how_to_replace(name, key)}"
            )
    where = _where(reference)
    with _loading(name, source, where, reference):
        check_there(source)
        file = _find(source, CONFIG_NAME, **where)
        if reference.get("adapter") is None:
            model_file = _find(source, "config.json", **where)
            if file is not None and model_file is None:
                reference.update(model=None, adapter=source)
            _check_depth(model_file, MAX_LAYERS, "more than any model has")
            file = model_file or file
        _pin(reference, "revision", file)
    if reference.get("adapter") and reference.get("model"):
        where = _base_where(reference)
        with _loading(name, reference["model"], where, reference):
            check_there(reference["model"])
            file = _find(reference["model"], "config.json", **where)
            _check_depth(file, MAX_LAYERS, "more than any model has")
            _pin(reference, "base_revision", file)
    return reference


def _pin(reference: dict[str, Any], key: str, file: Optional[str]) -> None:
    commit = extract_commit_hash(file, None)
    if commit is not None:
        reference[key] = commit


def _check_depth(config_file: Optional[str], most: int, why: str) -> None:
    """Raise `ValueError` if a config.json asks for more layers than `most`: making them would take all memory.

    All other sizes are compared with the weights' shapes before memory is taken for them.
    """
    if config_file is None:
        return
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    for values in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _DEPTHS:
            if isinstance(values.get(key), int) and values[key] > most:
                raise ValueError(f"its config.json has {key}={values[key]}, {why}.")


def _num_tensors(source: str, where: dict[str, Any]) -> Optional[int]:
    """Return how many tensors a checkpoint has, from its index or header; `None` where it has neither."""
    index = _find(source, SAFE_WEIGHTS_INDEX_NAME, **where)
    if index is not None:
        return len(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    file = _find(source, SAFE_WEIGHTS_NAME, **where)
    if file is None:
        return None
    with safe_open(file, "pt") as weights:
        return len(weights.keys())


def load_expert(name: str, reference: dict[str, Any], hub: PreTrainedModel) -> CausalLM:
    """Load the model that a resolved reference names, in the hub's dtype and on its device.

    Args:
        name: The expert's name, for errors.
        reference: What `resolve_reference` has returned.
        hub: The hub, whose weights a LoRA without a base of its own shares.

    Raises:
        ValueError: If it cannot be loaded.
    """
    where, adapter, base = _where(reference), reference.get("adapter"), reference.get("model")
    how = {key: reference[key] for key in ("quantization_config", *PLACEMENT_KEYS) if reference.get(key) is not None}
    if how and base is None:
        raise ValueError(
            f"Expert {name!r} is a LoRA on the hub's own weights, which are loaded already; {sorted(how)} cannot be "
            "set for it. Name its base as `model` to load that once more."
        )
    with _loading(name, _source(reference), where, reference), real_weights():
        if adapter is None:
            return _load_model(reference["model"], hub, **where, **how)
        how |= _base_where(reference)
        if base is None:
            twin = share_weights(hub)
            _check_leaves_hub_alone(twin, adapter, where)
            return _load_adapter(twin, adapter, where)
        return _load_adapter(_load_model(base, hub, **how), adapter, where)


def read_configs(name: str, reference: dict[str, Any]) -> tuple[Optional[PreTrainedConfig], Optional[PeftConfig]]:
    """Read the configs that a resolved reference leads to: the model's, and its adapter's. Reads no weights.

    Returns:
        The model's config, `None` where that is the hub; the adapter's config, `None` where there is no adapter.

    Raises:
        ValueError: If they cannot be read, or the adapter cannot be an expert.
    """
    where, adapter, base = _where(reference), reference.get("adapter"), reference.get("model")
    with _loading(name, _source(reference), where, reference):
        if adapter is None:
            return AutoConfig.from_pretrained(reference["model"], trust_remote_code=False, **where), None
        how = {"trust_remote_code": False, **_base_where(reference)}
        config = None if base is None else AutoConfig.from_pretrained(base, **how)
        return config, _adapter_config(adapter, where)


def check_adapter(config: PeftConfig) -> None:
    """Raise `ValueError` for adapters that cannot be experts: soft prompts, stitches, and X-LoRA.

    X-LoRA's config names further adapters, by any path or id, and nobody would have checked those.
    """
    if config.is_prompt_learning or config.peft_type in ("STITCH", "XLORA"):
        kind = peft_type_name(config.peft_type)
        raise ValueError(f"{kind} adapters cannot be experts; use a LoRA-like adapter or a full model.")


@contextmanager
def _loading(name: str, source: str, where: dict[str, Any], reference: dict[str, Any]) -> Iterator[None]:
    """Turn any error inside into a `ValueError` that says which expert failed, and where it was.

    If the reference comes from an adapter, which notes the expert's sizes in it, the error says what to do, too.
    """
    try:
        yield
    except Exception as error:  # files of others can make their loaders fail in any way
        at = f" at revision {where['revision']!r}" if "revision" in where else ""
        advice = f"\n{how_to_replace(name)}" if reference.get("config") else ""
        raise ValueError(f"Expert {name!r} could not be loaded from {source!r}{at}: {error}{advice}") from error


def _source(reference: dict[str, Any]) -> str:
    """Return what a resolved reference names first: its adapter, or else its model."""
    return reference.get("adapter") or reference["model"]


def _where(reference: dict[str, Any]) -> dict[str, Any]:
    return {key: reference[key] for key in ("revision", "subfolder") if reference.get(key)}


def _base_where(reference: dict[str, Any]) -> dict[str, Any]:
    return {"revision": reference["base_revision"]} if reference.get("base_revision") else {}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the reference of a model object: where it says it came from.

    Changes in memory since then are not in there; save such a model, and attach it by its path.
    """
    if isinstance(model, PeftModel):  # its own adapter may exist in memory only; the base alone would be another model
        return {"model": None}
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "") or None
    quantization = getattr(config, "quantization_config", None)
    reference = {"model": source}
    commit = _cached_commit(source)
    if commit is not None:
        reference["revision"] = commit
    if source is None or quantization is None or _is_stored_quantized(source):
        return reference
    return as_reference("model", {**reference, "quantization_config": quantization})


def _cached_commit(source: Optional[str]) -> Optional[str]:
    """The commit of a repository that this machine has loaded last; models do not note the one they came from."""
    path = try_to_load_from_cache(source, "config.json") if is_repo_id(source) else None
    return extract_commit_hash(path, None) if isinstance(path, str) else None


def _is_stored_quantized(source: str) -> bool:
    """Return whether a checkpoint itself is quantised, so that loading it takes no `quantization_config`."""
    path = _find(source, "config.json")
    return path is not None and "quantization_config" in json.loads(Path(path).read_text(encoding="utf-8"))


def _load_model(source: str, hub: PreTrainedModel, **how: Any) -> PreTrainedModel:
    device, dtype = place_for_stitch(hub)
    how.setdefault("device_map", device)  # straight to its place: quantised weights cannot all be moved later
    where = _where(how)
    tensors = _num_tensors(source, where)
    if tensors is not None:  # and every layer has at least one
        _check_depth(_find(source, "config.json", **where), tensors, f"but its weights are {tensors} tensors")
    # References come out of downloaded files: no code of theirs may run (`None` would ask the user), and only known
    # arguments are passed on.
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **how)


def _adapter_config(source: str, where: dict[str, Any]) -> PeftConfig:
    config = PeftConfig.from_pretrained(source, **where)
    check_adapter(config)
    return config


def _check_leaves_hub_alone(hub: PreTrainedModel, source: str, where: dict[str, Any]) -> None:
    config, file = _adapter_config(source, where), _find(source, SAFETENSORS_WEIGHTS_NAME, **where)
    if file is None:  # an old adapter, pickled
        tensors = load_peft_weights(source, device="cpu", **where)
        return check_leaves_base_alone(hub, config, tensors, tensors.__getitem__)
    with safe_open(file, "pt") as opened:
        return check_leaves_base_alone(hub, config, opened.keys(), opened.get_tensor)


def _load_adapter(base: PreTrainedModel, source: str, where: dict[str, Any]) -> PeftModel:
    _adapter_config(source, where)
    if is_dispatched(base):
        with adapters_where_layers_run(lambda layer: place_for_stitch(layer)[0]):
            # Made like its layers, on the meta device, then replaced by what is loaded.
            model = PeftModel.from_pretrained(base, source, low_cpu_mem_usage=True, **where)
    else:
        model = PeftModel.from_pretrained(base, source, **where).to(place_for_stitch(base)[0])
    file = _find(source, SAFETENSORS_WEIGHTS_NAME, **where)
    if file is not None:
        check_layers(model, file)
    return model


def how_to_replace(name: str, key: str = "model") -> str:
    """Say what to do about an expert that is missing, or is not the right one; the end of many errors."""
    return (
        "To use another copy of this expert, say where it is and hand the config over:\n"
        "    config = StitchConfig.from_pretrained(adapter)\n"
        f'    config.experts["{name}"]["{key}"] = "another id or path"\n'
        "    AutoPeftModelForCausalLM.from_pretrained(adapter, config=config)"
    )
