"""Workarounds for PEFT's internals, written against 0.21.2.

PEFT offers no hook for some of what stitch adapters need. Each function here adds one to PEFT by patching it, and says
when it could be removed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Optional, Union, cast

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, PeftType
from peft.auto import _BaseAutoPeftModel
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, transformers_weight_conversion
from torch import nn
from transformers import PreTrainedModel

from .patching import function_of, replace_method


CausalLM = Union[PreTrainedModel, PeftModel]  # the latter passes on all that the former has

# The hub onto which `PeftModel.from_pretrained` is loading a new adapter.
_HUB_BEING_LOADED_ONTO: ContextVar[Optional[nn.Module]] = ContextVar("hub_being_loaded_onto", default=None)
# What the config that `AutoPeftModelForCausalLM.from_pretrained` was given says of the seed.
_SEED: ContextVar[dict[str, Any]] = ContextVar("seed", default={})  # noqa: B039  # never edited


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, adding the member if PEFT has none.

    Follows what `enum` itself does for a member of a `str` enum (Python 3.9 to 3.13), then makes it visible under
    all three lookups: by name, by value, in iteration.

    It could be removed if `register_peft_method` took methods that are not in the enum.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # `PeftType.NAME`; EnumMeta refuses plain setattr
    return PeftType[name]


def peft_type_name(peft_type: Union[str, PeftType, None]) -> str:
    """The name of a PEFT method, such as `"LORA"`; PEFT has it as a string or as a member of its enum."""
    return PeftType(peft_type).value


def base_model(model: PeftModel) -> PreTrainedModel:
    """The model around which PEFT has put an adapter. PEFT takes any module; ours are all causal LMs."""
    return cast(PreTrainedModel, model.get_base_model())


def check_config_files(check: Callable[[dict[str, Any], str], dict[str, Any]]) -> None:
    """Have `check(values, path)` look through what PEFT has read from the config file of a stitch adapter.

    `PeftConfig.from_pretrained` reads the file before it knows the class, so a method of the class is not enough.

    It could be removed if it found the class first, and had that read the file.
    """
    read = function_of(PeftConfigMixin, "from_json_file")

    @functools.wraps(read)
    def from_json_file(cls: type[Any], /, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        values = read(cls, path_json_file, **kwargs)
        return {**check(values, path_json_file), **_SEED.get()} if values.get("peft_type") == "STITCH" else values

    replace_method(PeftConfigMixin, "from_json_file", classmethod(from_json_file))


def take_seeds_from_configs(explain: Callable[[str, Any, OSError], Optional[str]]) -> None:
    """Have `AutoPeftModelForCausalLM.from_pretrained(adapter, config=config)` load the seed that `config` names.

    PEFT reads the adapter's file for it, whatever `config` says. If an `OSError` comes up and
    `explain(adapter, arguments, error)` has something to say of it, that becomes the message.

    It could be removed if PEFT took the seed from the config that it is given.
    """
    load = function_of(_BaseAutoPeftModel, "from_pretrained")

    @functools.wraps(load)
    def from_pretrained(cls: type[Any], adapter: str, *args: Any, **kwargs: Any) -> PeftModel:
        given = inspect.signature(load).bind(cls, adapter, *args, **kwargs).arguments
        config = given.get("config")
        keys = () if config is None else ("base_model_name_or_path", "revision")
        token = _SEED.set({key: getattr(config, key) for key in keys})
        try:
            return load(cls, adapter, *args, **kwargs)
        except OSError as error:
            message = explain(adapter, given, error)
            if message is None:
                raise
            raise OSError(message) from error
        finally:
            _SEED.reset(token)

    replace_method(_BaseAutoPeftModel, "from_pretrained", classmethod(from_pretrained))


def after_model_card(update: Callable[[PeftModel, str, list[str]], None]) -> None:
    """Have `update(model, folder, tags)` called whenever PEFT has written the model card of a stitched model.

    `save_pretrained` writes it, and `Trainer.create_model_card` writes it anew. `tags` are those that were there
    before, which PEFT drops.

    It could be removed if `create_or_update_model_card` asked the tuner for a section, and kept the tags.
    """
    write = function_of(PeftModel, "create_or_update_model_card")

    @functools.wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if self.peft_type != "STITCH":
            return write(self, output_dir)
        before = os.path.join(output_dir, "README.md")
        tags = list(ModelCard.load(before).data.tags or []) if os.path.isfile(before) else []
        write(self, output_dir)
        update(self, output_dir, tags)

    replace_method(PeftModel, "create_or_update_model_card", create_or_update_model_card)


def around_saving(before: Callable[[PeftModel], None], update: Callable[[PeftModel, str, str], None]) -> None:
    """Have `update(model, adapter, folder)` called for every stitch adapter that `save_pretrained` has saved.

    `before(model)` is called first. Also notes in the config whether the user has asked for the embedding layers,
    which PEFT does not.

    It could be removed with `after_model_card`, and if PEFT's configs said what is in the file.
    """
    save = function_of(PeftModel, "save_pretrained")

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        if self.peft_type != "STITCH":
            return save(self, *args, **kwargs)
        call = inspect.signature(save).bind(self, *args, **kwargs)
        call.apply_defaults()
        folder, adapters = call.arguments["save_directory"], call.arguments["selected_adapters"]
        before(self)
        configs: dict[str, Any] = self.peft_config
        for config in configs.values():
            config.save_embedding_layers = call.arguments["save_embedding_layers"] is True
        if not self.base_model.writes_files:
            call.arguments["is_main_process"] = False
        save(*call.args, **call.kwargs)
        if call.arguments["is_main_process"]:
            for adapter in configs if adapters is None else adapters:
                update(self, adapter, folder if adapter == "default" else os.path.join(folder, adapter))

    replace_method(PeftModel, "save_pretrained", save_pretrained)


def around_push(before: Callable[[PeftModel], None], card: Callable[[PeftModel, str, str], None]) -> None:
    """For stitched models, have `push_to_hub` call `before(model)` first, and `card(model, folder, repo_id)` last.

    `push_to_hub` writes the card of the repository, or an empty template, over the one that `save_pretrained` has
    just made, and uploads the folder then.

    It could be removed if it updated the card that it pushes, and asked the tuner first.
    """
    push, upload = (function_of(PeftModel, name) for name in ("push_to_hub", "_upload_modified_files"))

    @functools.wraps(push)
    def push_to_hub(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type == "STITCH":
            before(self)
        return push(self, *args, **kwargs)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type == "STITCH":
            card(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    replace_method(PeftModel, "push_to_hub", push_to_hub)
    replace_method(PeftModel, "_upload_modified_files", _upload_modified_files)


def keep_offloaded_hubs() -> None:
    """Leave the hooks of an offloaded hub alone when a stitch adapter is loaded onto it.

    Where it sees `hf_device_map`, PEFT takes the hooks off and has accelerate place the weights once more, under the
    names that they have without adapters, together with the adapter and so with all experts. Stitches wrap whole
    layers, whose hooks stay where they are, so there is nothing to be done.

    It could be removed if a tuner could tell PEFT that it leaves the layers' hooks as they are.
    """
    load_model, load = (function_of(PeftModel, name) for name in ("from_pretrained", "load_adapter"))

    @functools.wraps(load_model)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> PeftModel:
        stitched = False
        places = (getattr(model, "hf_device_map", None) or {}).values()
        if "cpu" in places or "disk" in places:  # else PEFT leaves the hooks alone
            config = inspect.signature(load_model).bind(cls, model, model_id, *args, **kwargs).arguments.get("config")
            where = {k: kwargs[k] for k in ("subfolder", "revision", "cache_dir", "token") if k in kwargs}
            kind = PeftConfig._get_peft_type(model_id, **where) if config is None else config.peft_type
            stitched = kind == "STITCH"
        with _without_device_map(model) if stitched else nullcontext():
            return load_model(cls, model, model_id, *args, **kwargs)

    @functools.wraps(load)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with _without_device_map(self.get_base_model()) if self.peft_type == "STITCH" else nullcontext():
            return load(self, *args, **kwargs)

    replace_method(PeftModel, "from_pretrained", classmethod(from_pretrained))
    replace_method(PeftModel, "load_adapter", load_adapter)


@contextmanager
def _without_device_map(hub: nn.Module) -> Iterator[None]:
    device_map = vars(hub).pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            vars(hub)["hf_device_map"] = device_map


def undo_failed_loads(undo: Callable[[Any, str], None]) -> None:
    """Have `undo(tuner, adapter)` called when the weights of a new stitch adapter could not be loaded.

    PEFT makes an adapter before it reads the weights, and leaves it there, untrained, whatever happens to them. An
    adapter that was there before stays. Errors become `ValueError`s that name the file.

    It could be removed if `load_adapter` and `from_pretrained` deleted what they have made.
    """
    load_model, load = (function_of(PeftModel, name) for name in ("from_pretrained", "load_adapter"))

    @functools.wraps(load_model)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        token = _HUB_BEING_LOADED_ONTO.set(model)
        try:
            return load_model(cls, model, *args, **kwargs)  # which calls `load_adapter` of what it has made
        finally:
            _HUB_BEING_LOADED_ONTO.reset(token)

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type != "STITCH":
            return load(self, model_id, adapter_name, *args, **kwargs)
        new = adapter_name not in self.peft_config or self.get_base_model() is _HUB_BEING_LOADED_ONTO.get()
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        except BaseException as error:
            if adapter_name not in self.peft_config:  # it could not even be made: the error is not about weights
                raise
            if new:
                undo(self.base_model, adapter_name)
            if not isinstance(error, Exception) or (isinstance(error, OSError) and not os.path.isdir(model_id)):
                raise  # interrupted; no network
            place, reason = _place_of_weights(model_id, **kwargs), str(error) or type(error).__name__
            if os.path.isdir(model_id) and not os.path.isfile(place):
                reason = "there is no such file."
            raise ValueError(f"Adapter {adapter_name!r} could not be loaded from {place!r}: {reason}") from error

    replace_method(PeftModel, "from_pretrained", classmethod(from_pretrained))
    replace_method(PeftModel, "load_adapter", load_adapter)


def before_setting_weights(check: Callable[[nn.Module, str, dict[str, Any]], None]) -> None:
    """Have `check(model, adapter, tensors)` called before `set_peft_model_state_dict` looks into a stitch adapter's.

    It is done in the place of the conversion of weights, which PEFT looks up anew for every call: users may have
    imported `set_peft_model_state_dict` before this package.

    It could be removed if PEFT gave the tuner the tensors before it looks up those of `modules_to_save`.
    """
    name = "convert_peft_adapter_state_dict_for_transformers"
    convert = function_of(transformers_weight_conversion, name)

    @functools.wraps(convert)
    def checked(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Any], adapter_name: str = "default"
    ) -> dict[str, Any]:
        if peft_config.peft_type == "STITCH":
            check(model, adapter_name, adapter_state_dict)
        return convert(model, peft_config, adapter_state_dict, adapter_name)

    replace_method(transformers_weight_conversion, name, checked)


def _place_of_weights(model_id: str, subfolder: Optional[str] = None, revision: Optional[str] = None, **_: Any) -> str:
    """Return where PEFT looks for the weights of an adapter: a file, or what it was asked to download."""
    if not os.path.isdir(model_id):
        return os.fspath(model_id) + (f" at revision {revision}" if revision else "")
    files = [os.path.join(model_id, subfolder or "", name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    return next(filter(os.path.isfile, files), files[0])


@contextmanager
def adapters_where_layers_run(device_of: Callable[[nn.Module], torch.device]) -> Iterator[None]:
    """Have PEFT load adapters to `device_of(layer)` where an offloaded layer holds meta tensors.

    It would move them to the meta device as well, for accelerate to place them anew with all weights.

    It could be removed if the method that is replaced here asked the layer's accelerate hook.
    """
    name = "_get_base_layer_device_and_dtype"
    ask = function_of(BaseTunerLayer, name)

    def device_and_dtype(self: BaseTunerLayer, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = ask(self, base_layer)
        return (device_of(base_layer) if device is not None and device.type == "meta" else device), dtype

    replace_method(BaseTunerLayer, name, device_and_dtype)
    try:
        yield
    finally:
        replace_method(BaseTunerLayer, name, ask)
