"""Sharing through the Hugging Face Hub: what others cannot load, and `push_experts`, which uploads it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional, Union

from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from .._compat.bitsandbytes import saves_repacked_weights
from .._compat.peft import CausalLM, base_model
from ..config import StitchConfig
from ..experts.loading import resolve_reference
from ..experts.weight_sharing import share_weights
from ..forward.decoder import token_embeddings
from ..forward.expert import Expert
from ..model import StitchModel, stitch_tuner
from ..reference import is_repo_id
from ..stitch import HUB
from .model_card import update_model_card


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
    as they are. Of a LoRA expert only the LoRA is uploaded. If an upload fails, the ones before it are done and noted;
    call again for the rest.

    Args:
        model: The stitched model.
        repo_id: Where to upload to: an id that has `{name}` for the expert's name, such as `"org/seed-{name}"`, or a
            dict of ids by expert.
        seed: Where to upload the seed to, if it exists only here.
        private, token, commit_message: As for `push_to_hub`.

    Returns:
        What was uploaded: expert's name (`"hub"` for the seed) -> id of its repository.

    Raises:
        ValueError: If an expert has no id, or cannot be uploaded; nothing is uploaded then.
    """
    tuner = model.base_model
    if not isinstance(tuner, StitchModel):
        raise ValueError(f"Expected a model with a stitch adapter, got a {type(model).__name__} without.")
    tuner._refuse_parallel("push_experts()")
    adapter = tuner._single_active_adapter()
    config, experts, hub = tuner.peft_config[adapter], tuner.experts[adapter], tuner.model
    ids = _ids([name for name in sorted(experts.keys()) if _is_local(config.experts[name])], repo_id)
    uploads = {name: _Upload.of_expert(name, experts[name], config.experts[name], hub) for name in ids}
    if not is_repo_id(_seed(model, config)):
        if seed is None:
            raise ValueError(f"{_seed_problem(model, config)}; say where to upload it: seed='org/name'.")
        uploads, ids = (
            {HUB: _Upload("The seed", share_weights(hub), _seed(model, config)), **uploads},
            {HUB: seed, **ids},
        )
    for upload in uploads.values():
        upload.check()

    api, how = HfApi(token=token), {"private": private, "token": token, "commit_message": commit_message}
    for name, upload in uploads.items():
        ids[name], commit = upload.push(ids[name], api, how)
        if name == HUB:
            hub.config._name_or_path = hub.name_or_path = ids[name]
            for other in tuner.peft_config.values():
                other.base_model_name_or_path, other.revision = ids[name], commit
        else:
            reference = {**upload.reference_to(ids[name], commit), "config": config.experts[name]["config"]}
            tuner._note_experts(adapter, {**tuner.peft_config[adapter].experts, name: reference})
            if experts[name].source is not None:
                experts[name].source = {key: value for key, value in reference.items() if key != "config"}
    return ids


def push_adapter(
    model: PeftModel,
    folder: str,
    repo_id: str,
    *,
    private: Optional[bool] = None,
    token: Union[bool, str, None] = None,
) -> str:
    """Upload an adapter that was loaded from a folder, with the card and the tokenizer that lie beside it.

    `model.push_to_hub` uploads stitches alone, and begins the card anew.

    Args:
        model: The adapter's model; `push_experts` has made sure that others can load its experts.
        folder: Where it was loaded from.
        repo_id: Where to upload to.
        private, token: As for `push_to_hub`.

    Returns:
        The repository's full id.

    Raises:
        ValueError: If others could not load the adapter; nothing is uploaded then.
    """
    check_others_can_load(model)
    api = HfApi(token=token)
    with TemporaryDirectory() as place:
        card = Path(folder, "README.md")
        if card.is_file():
            shutil.copy(card, place)
        if Path(folder, "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(place)
        model.save_pretrained(place)
        update_model_card(model, next(iter(model.peft_config)), place, repo_id=repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=place, commit_message="Upload stitch adapter")
    return repo_id


@dataclass
class _Upload:
    """A model that is to be uploaded: from its folder if it has one, or else as it is in memory.

    Attributes:
        what: What to call it in errors.
        model: The model; for a LoRA, the one with the LoRA.
        folder: Where it was loaded from.
        base: For a LoRA, what its base is, by id or path; `None` for the hub itself.
        rest: What else its reference says, and will go on saying.
    """

    what: str
    model: CausalLM
    folder: Optional[str]
    base: Optional[str] = None
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_expert(cls, name: str, expert: Expert, reference: dict[str, Any], hub: PreTrainedModel) -> _Upload:
        model, source = expert.model, _source(reference)
        folder: Optional[str] = None
        base: Optional[str] = None
        kept: list[str] = []
        # Without a source it was attached as an object, which may differ from what lies there.
        if expert.source is not None and source is not None:
            folder = os.path.join(source, reference.get("subfolder") or "")
            kept = ["quantization_config"]
        if isinstance(model, PeftModel):
            loaded = base_model(model)
            if token_embeddings(loaded).weight is not token_embeddings(hub).weight:
                base = reference.get("model") or loaded.name_or_path
                base = None if base == hub.name_or_path else base
            kept = [*kept, "base_revision"]
        rest = {key: reference[key] for key in kept if reference.get(key)}
        return cls(f"Expert {name!r}", model, folder, base, rest)

    @property
    def _saved(self) -> Optional[str]:
        """The folder, if there are weights in it that others can load."""
        return self.folder if self.folder and any(Path(self.folder).glob("*.safetensors")) else None

    def check(self) -> None:
        """Raise `ValueError` if it cannot be uploaded, or not so that others can load it."""
        if self.base is not None and not is_repo_id(self.base):
            raise ValueError(
                f"{self.what} is a LoRA on {self.base!r}, which exists only here. Upload that model yourself, then "
                'attach the expert with its id: {"model": id, "adapter": the LoRA}.'
            )
        quantizer = getattr(self.model, "hf_quantizer", None)
        repacked = saves_repacked_weights(self.model)
        if quantizer is not None and self._saved is None and (repacked or not quantizer.is_serializable()):
            config: Any = self.model.config
            kind = config.quantization_config.quant_method
            raise ValueError(
                f"{self.what} is quantised ({kind}) in a way that cannot be saved here. Load it by id or path "
                "with `quantization_config=...`; the original is then what is uploaded."
            )

    def push(self, repo_id: str, api: HfApi, how: dict[str, Any]) -> tuple[str, str]:
        """Upload; return the repository's full id and the commit."""
        saved = self._saved
        if saved is None:
            model: Any = self.model  # transformers types this method wrongly, as one without `self`
            commit = model.push_to_hub(repo_id, **how)
            return commit.repo_url.repo_id, commit.oid
        repo_id = api.create_repo(repo_id, private=how["private"], exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=saved,
            commit_message=how["commit_message"],
            allow_patterns=_LORA_FILES if isinstance(self.model, PeftModel) else _FILES,
            ignore_patterns=_NOT_THOSE,
        )
        return repo_id, commit.oid

    def reference_to(self, repo_id: str, commit: str) -> dict[str, Any]:
        lora = isinstance(self.model, PeftModel)
        places = {"model": self.base, "adapter": repo_id} if lora else {"model": repo_id}
        return {**places, "revision": commit, **self.rest}


def check_others_can_load(model: PeftModel) -> None:
    """Before a push: check that others can load the adapters, and pin references to commits that are not pinned yet.

    Raises:
        ValueError: If an adapter refers to a model that exists only on this machine, or nowhere.
    """
    tuner = stitch_tuner(model)
    for adapter, config in list(tuner.peft_config.items()):
        problems = [
            f"expert {name!r} is {_source(reference) or 'a model object'}"
            for name, reference in sorted(config.experts.items())
            if _is_local(reference)
        ]
        if not is_repo_id(_seed(model, config)):
            problems.insert(0, _seed_problem(model, config))
        if problems:
            raise ValueError(
                f"Others could not load this adapter, since it refers to what exists only here: {'; '.join(problems)}."
                "\nUpload that first, `peft_bts.push_experts(model, 'org/{name}')`, or load the adapter with a config "
                "that names ids. To upload a copy for yourself all the same: `model.save_pretrained(folder)`, then "
                "`hf upload <id> <folder>`."
            )
        pinned = {
            name: reference if reference.get("revision") else resolve_reference(name, reference)
            for name, reference in config.experts.items()
        }
        if pinned != config.experts:
            tuner._note_experts(adapter, pinned)


def _is_local(reference: dict[str, Any]) -> bool:
    sources = [reference[key] for key in ("model", "adapter") if reference.get(key) is not None]
    return not sources or not all(map(is_repo_id, sources))


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
