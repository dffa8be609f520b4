"""Sharing through the Hub: what others cannot load, and `push_experts`, which uploads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from .config import StitchConfig, is_on_hub
from .experts import Expert
from .loading import resolve_reference, share_weights
from .model import StitchModel


# What a checkpoint folder holds for others. Not code, not the optimizer, not pickles, not nested checkpoints.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
_LORA_FILES = ["adapter_*.json", "adapter_*.safetensors", "README.md"]
_NOT_THOSE = ["*/*", "trainer_state.json"]


def push_experts(
    model: PeftModel,
    repo_id: Union[str, dict[str, str]],
    *,
    seed: Optional[str] = None,
    private: Optional[bool] = None,
    token: Union[bool, str, None] = None,
    commit_message: str = "Upload expert",
) -> dict[str, str]:
    """Upload the active adapter's experts that exist only here, and refer to them by id and commit from now on.

    `model.push_to_hub(...)` then uploads an adapter that others can load. Experts that were loaded from a folder are
    uploaded as they lie there, with their tokenizer, in their own dtype; loaded models that were attached are saved
    as they are. Of a LoRA expert only the LoRA is uploaded. If an upload fails, those before it are done; call again.

    Args:
        model: The stitched model.
        repo_id: Where to: an id with `{name}` in it for the expert's name, `"org/seed-{name}"`, or ids by name.
        seed: Id for the seed, if that exists only here.
        private, token, commit_message: As for `push_to_hub`.

    Returns:
        What was uploaded: expert's name (`"hub"` for the seed) -> id of its repository.

    Raises:
        ValueError: If an expert has no id, or cannot be uploaded; nothing is uploaded then.
    """
    tuner = model.base_model
    if not isinstance(tuner, StitchModel):
        raise ValueError(f"Expected a model with a stitch adapter, got a {type(model).__name__} without.")
    adapter = tuner._single_active_adapter()
    config, experts = tuner.peft_config[adapter], tuner.experts[adapter]
    local = [name for name in sorted(experts.keys()) if _is_local(config.experts[name])]
    ids = _ids(local, repo_id)
    seed_is_local = not is_on_hub(_seed(model, config))
    if seed is None and seed_is_local:
        raise ValueError(f"{_seed_problem(model, config)}; say where to upload it: seed='org/name'.")
    for name in local:
        _check_can_be_pushed(name, experts[name], tuner.model, config.experts[name], seed)

    api, how = HfApi(token=token), {"private": private, "token": token, "commit_message": commit_message}
    if seed_is_local:
        repo, commit = _push_folder_or(share_weights(tuner.model), _seed(model, config), None, seed, api, how)
        tuner.model.config._name_or_path = tuner.model.name_or_path = repo
        for other in tuner.peft_config.values():
            other.base_model_name_or_path, other.revision = repo, commit
    for name in local:
        reference, expert = config.experts[name], experts[name]
        lora = isinstance(expert.model, PeftModel)
        place = None if expert.source is None else reference["adapter" if lora else "model"]
        repo, commit = _push_folder_or(expert.model, place, reference.get("subfolder"), ids[name], api, how)
        place = {"adapter": repo, "model": _base_of(expert.model, tuner.model, reference)} if lora else {"model": repo}
        moved = {key: value for key, value in reference.items() if key != "subfolder"}
        moved |= {**place, "revision": commit}
        tuner._set_experts(adapter, {**tuner.peft_config[adapter].experts, name: moved})
        if expert.source is not None:
            expert.source = {key: value for key, value in moved.items() if key != "config"}
    return {**({"hub": seed} if seed_is_local else {}), **ids}


def check_others_can_load(model: PeftModel) -> None:
    """Pin what is not pinned yet in adapters that are to be pushed.

    Raises:
        ValueError: If they refer to what exists only here, or is not there.
    """
    for adapter, config in list(model.peft_config.items()):
        problems = [
            f"expert {name!r} is {_source(reference) or 'a model object'}"
            for name, reference in sorted(config.experts.items())
            if _is_local(reference)
        ]
        if not is_on_hub(_seed(model, config)):
            problems.insert(0, _seed_problem(model, config))
        if problems:
            raise ValueError(
                f"Others could not load this adapter, since it refers to what exists only here: {'; '.join(problems)}."
                "\nUpload that first, `peft_bts.push_experts(model, 'org/{name}')`, or load the adapter with a config "
                "that names ids. To keep a copy of your own on the Hub all the same: `model.save_pretrained(folder)`, "
                "`hf upload <id> <folder>`."
            )
        pinned = {
            name: reference if reference.get("revision") else resolve_reference(name, reference)
            for name, reference in config.experts.items()
        }
        if pinned != config.experts:
            model.base_model._set_experts(adapter, pinned)


def _is_local(reference: dict[str, Any]) -> bool:
    sources = [reference[key] for key in ("model", "adapter") if reference.get(key) is not None]
    return not sources or not all(map(is_on_hub, sources))


def _source(reference: dict[str, Any]) -> Optional[str]:
    return reference.get("adapter") or reference.get("model")


def _seed(model: PeftModel, config: StitchConfig) -> Optional[str]:
    return config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None) or None


def _seed_problem(model: PeftModel, config: StitchConfig) -> str:
    return f"the seed is {_seed(model, config) or 'a model object'}"


def _ids(local: list[str], repo_id: Union[str, dict[str, str]]) -> dict[str, str]:
    if isinstance(repo_id, dict):
        if set(repo_id) != set(local):
            raise ValueError(f"The experts that exist only here are {local}, but ids are given for {sorted(repo_id)}.")
        return dict(repo_id)
    ids = {name: repo_id.replace("{name}", name) for name in local}
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"repo_id={repo_id!r} would put all of {local} into one repository; write {{name}} in it.")
    return ids


def _check_can_be_pushed(
    name: str, expert: Expert, hub: nn.Module, reference: dict[str, Any], seed: Optional[str]
) -> None:
    model = expert.model
    if isinstance(model, PeftModel):
        base = _base_of(model, hub, reference)
        if base is not None and not is_on_hub(base):
            raise ValueError(
                f"Expert {name!r} is a LoRA on {base!r}, which exists only here. Upload that model yourself, then "
                f'set `config.experts["{name}"]["model"]` to its id.'
            )
        return
    quantizer = getattr(model, "hf_quantizer", None)
    from_folder = expert.source is not None and _has_weights(reference.get("model"), reference.get("subfolder"))
    if quantizer is not None and not from_folder and not quantizer.is_serializable():
        kind = model.config.quantization_config.quant_method
        raise ValueError(
            f"Expert {name!r} is quantised ({kind}) in a way that transformers cannot save. Attach it by id or path "
            "with `quantization_config=...`; the original is then what is uploaded."
        )


def _base_of(lora: PeftModel, hub: nn.Module, reference: dict[str, Any]) -> Optional[str]:
    """What a LoRA expert's `model` refers to: `None` for the hub's own weights."""
    base = lora.get_base_model()
    if base.get_input_embeddings().weight is hub.get_input_embeddings().weight:
        return None
    source = reference.get("model") or base.name_or_path
    return None if source == hub.name_or_path else source


def _has_weights(place: Optional[str], subfolder: Optional[str]) -> bool:
    return place is not None and any(Path(place, subfolder or "").glob("*.safetensors"))


def _push_folder_or(
    model: nn.Module, place: Optional[str], subfolder: Optional[str], repo: str, api: HfApi, how: dict[str, Any]
) -> tuple[str, str]:
    """Upload the folder that a model lies in, or else the model; return the repository's full id and the commit."""
    if not _has_weights(place, subfolder):
        commit = model.push_to_hub(repo, **how)
        return commit.repo_url.repo_id, commit.oid
    folder = os.path.join(place, subfolder or "")
    files = _LORA_FILES if os.path.isfile(os.path.join(folder, CONFIG_NAME)) else _FILES
    repo = api.create_repo(repo, private=how["private"], exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=how["commit_message"],
        allow_patterns=files,
        ignore_patterns=_NOT_THOSE,
    )
    return repo, commit.oid
