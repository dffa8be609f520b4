"""Models from their configs alone: every module in its shape, no weight read, no memory taken.

Torch's *fake tensors* know their shape, dtype and device, and no numbers. A model made of them still runs its own
code, so what it would store, cache and compute can be counted.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Optional, Union

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .._compat.peft import CausalLM, base_model, peft_type_name
from .._compat.transformers import find_file, is_mixture
from ..reference import as_reference, check_there
from .loading import check_adapter, read_configs, resolve_reference
from .weight_sharing import share_weights


ModelLike = Union[CausalLM, PreTrainedConfig, str, os.PathLike[str], dict[str, Any]]


class no_weights(FakeTensorMode):
    """The context in which blueprints are made, and run."""

    def __deepcopy__(self, memo: dict[int, Any]) -> no_weights:
        return self  # copies of fake tensors belong to the same context


def hub_blueprint(hub: ModelLike, dtype: Optional[torch.dtype] = None) -> PreTrainedModel:
    """The hub, without weights.

    Args:
        hub: A model, id, path, reference dict, or config.
        dtype: Of the weights; `None` for the config's.

    Raises:
        ValueError: If its config cannot be read.
    """
    if isinstance(hub, nn.Module):
        return _model(hub.config, dtype)
    if isinstance(hub, PreTrainedConfig):
        return _model(hub, dtype)
    reference = hub if isinstance(hub, dict) else {"model": os.fspath(hub)}
    source = str(reference.get("model"))
    where = {key: reference[key] for key in ("revision", "subfolder") if reference.get(key)}
    try:
        check_there(source)
        return _model(AutoConfig.from_pretrained(source, trust_remote_code=False, **where), dtype)
    except (OSError, ValueError) as error:
        adapter = _adapter_at(source, where)
        if adapter is not None:
            raise ValueError(
                f"{source!r} is a {peft_type_name(adapter.peft_type)} adapter, not a model, so it cannot be the hub. "
                f"Its base is {adapter.base_model_name_or_path!r}: give that, or merge the adapter into a model."
            ) from error
        raise ValueError(
            f"The hub's config could not be read from {source!r}: {error}\nGive the id or folder of a "
            "causal language model of transformers. Load one that brings its own code yourself, and give the object."
        ) from error


def _adapter_at(source: str, where: dict[str, Any]) -> Optional[PeftConfig]:
    """The config of an adapter that lies in a folder or repository without a model."""
    try:
        if find_file(source, "config.json", out_of_reach_is_none=True, **where) is None:
            return PeftConfig.from_pretrained(source, **where)
    except (OSError, ValueError):  # nothing is there
        pass
    return None


def expert_blueprint(name: str, expert: ModelLike, hub: CausalLM, dtype: Optional[torch.dtype] = None) -> CausalLM:
    """An expert, without weights. A LoRA of the hub shares the blueprint of the hub, as `load_expert` has it.

    Args:
        name: The expert's name, for errors.
        expert: A model, id, path, reference dict, or config.
        hub: The hub's blueprint.
        dtype: Of the weights; `None` for the config's.

    Raises:
        ValueError: If its config cannot be read, or it is an adapter that cannot be an expert.
    """
    config: Optional[PreTrainedConfig]
    adapter: Optional[PeftConfig] = None
    if isinstance(expert, PeftModel):
        config, adapter = base_model(expert).config, expert.peft_config[expert.active_adapter]
        check_adapter(adapter)
    elif isinstance(expert, nn.Module):
        config = expert.config
    elif isinstance(expert, PreTrainedConfig):
        config = expert
    else:
        config, adapter = read_configs(name, resolve_reference(name, as_reference(name, expert)))
    try:
        model = share_weights(hub) if config is None else _model(config, dtype)
        return model if adapter is None else _with_adapter(model, adapter)
    except (ValueError, RuntimeError) as error:  # no causal language model; an adapter of other modules
        raise ValueError(f"Expert {name!r} cannot be made from its config: {error}") from error


def _model(config: PreTrainedConfig, dtype: Optional[torch.dtype]) -> PreTrainedModel:
    config = copy.deepcopy(config)  # which `from_config` edits
    config.__dict__.pop("quantization_config", None)  # shapes before quantisation are what stitches see
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, trust_remote_code=False
        )
    model.tie_weights()
    if is_mixture(model):
        model.set_experts_implementation("batched_mm")  # other kernels depend on numbers, or know no fake tensors
    return model.eval()


def _with_adapter(base: CausalLM, adapter: PeftConfig) -> PeftModel:
    adapter = copy.deepcopy(adapter)
    if hasattr(adapter, "init_lora_weights"):
        adapter.init_lora_weights = False  # some of the other values compute with the base's weights
    # PEFT moves what it has made to the base's device. Torch cannot move fake weights; those on meta PEFT leaves.
    with unset_fake_temporarily():
        model = PeftModel(base, adapter, low_cpu_mem_usage=True)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    return model.eval()
