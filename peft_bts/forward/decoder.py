"""Where a causal LM keeps its decoder layers, if it is one that can be stitched."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from .._compat.peft import CausalLM


# Takes `past_key_values`, but in most supported versions of transformers its recurrent layers keep their state in
# themselves; and they run over padding as over text.
_STATE_IN_LAYERS = ("recurrent_gemma",)


@dataclass(frozen=True)
class Decoder:
    """The place where a causal LM keeps its decoder layers."""

    backbone: PreTrainedModel  # the module whose forward loops over the layers
    list_name: str  # its attribute that holds them, a ModuleList
    path: str  # dotted path of that list from the model

    @property
    def backbone_path(self) -> str:
        """Dotted path of the backbone from the model."""
        return self.path.rpartition(".")[0]

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.backbone, self.list_name)


def text_config(model: nn.Module) -> Any:
    """The config of the model's language part, or `None`."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def token_embeddings(model: CausalLM) -> nn.Embedding:
    """The layer that embeds tokens, or what PEFT has put around it."""
    return cast(nn.Embedding, model.get_input_embeddings())


def find_decoder(model: nn.Module, what: str) -> Decoder:
    """Find the decoder layers of a causal LM.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        what: What to call it in errors, e.g. `"The hub"`.

    Raises:
        ValueError: If there is no list of `num_hidden_layers` layers, more than one, the model keeps its state
            outside a `past_key_values` cache (state-space models such as Mamba), or DeepSpeed has loaded it in parts.
    """
    config = text_config(model)
    kind = getattr(config, "model_type", type(model).__name__)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{what} ({kind}) has been loaded in parts by DeepSpeed (zero.Init), so its layers cannot be run yet. "
            "Make the stitched model before `TrainingArguments` or `Accelerator`, from models loaded whole; DeepSpeed "
            "shards them when training begins."
        )
    num_layers = getattr(config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside_a_layer = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inside_a_layer:
            found[path] = module
    if len(found) != 1:
        raise ValueError(
            f"{what} ({kind}) is of an unknown architecture: expected one list of config.num_hidden_layers="
            f"{num_layers} decoder layers, found {sorted(found) or 'none'}. Stitches need a decoder-only language "
            "model of transformers."
        )
    path = next(iter(found))
    parent, _, list_name = path.rpartition(".")
    decoder = Decoder(cast(PreTrainedModel, model.get_submodule(parent)), list_name, path)
    arguments = inspect.signature(decoder.backbone.forward).parameters
    if "input_ids" not in arguments:
        raise ValueError(
            f"{what} ({kind}) is of an unknown architecture: the module around its layers, {parent!r}, takes no "
            "`input_ids`, as that of a decoder-only language model does."
        )
    if "past_key_values" not in arguments or kind in _STATE_IN_LAYERS:
        raise ValueError(
            f"{what} ({kind}) keeps its state outside `past_key_values`, as state-space models do; its layers cannot "
            "be run one by one beside another model. Use a model with attention layers, or a hybrid such as bamba."
        )
    return decoder
