"""`model.export(path)`: from an adapter and its models to a standalone checkpoint (see standalone.py)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from .._compat.peft import CausalLM
from ..config import StitchConfig
from ..experts.weight_sharing import share_weights
from ..forward.composition import Composition
from ..forward.decoder import find_decoder, token_embeddings
from ..forward.expert import Expert
from ..forward.head import ModelHead
from ..forward.layer import output_mixtures
from ..forward.recorder import layer_return_sizes
from ..install import how_to_install
from ..mixture import OutputMixture
from ..stitch import HUB, PerModel, Stitch
from .config import StitchExportConfig
from .model import StitchExportForCausalLM


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- stitch
- branch-train-stitch
---

# A stitched model

`import peft_bts` before loading it: transformers does not know the architecture otherwise. To install: {install}.

```python
import peft_bts
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path or id of this model")
```

Several models ({models}) and the stitches between them in one checkpoint, made by Branch-Train-Stitch
([arXiv 2502.00075](https://arxiv.org/abs/2502.00075)). The original models are not needed.
"""


def export_composition(
    path: Union[str, os.PathLike[str]],
    hub: PreTrainedModel,
    composition: Composition,
    experts: Mapping[str, Expert],
    stitches: Mapping[int, Stitch],
    config: StitchConfig,
    adapter: str,
    **kwargs: Any,
) -> None:
    """Write hub, experts and stitches as one checkpoint that `AutoModelForCausalLM.from_pretrained(path)` loads.

    Args:
        path: The folder.
        hub: The hub, with or without stitches around its layers.
        composition: What the adapter runs.
        experts: The experts that take part, by name; the others are not exported.
        stitches: The adapter's stitches by hub layer.
        config, adapter: The adapter's config and name.
        **kwargs: For `PreTrainedModel.save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: If a model is quantised, or the output gates go by evidence.
    """
    if composition.forgetting is not None:
        raise ValueError(
            "A stitched model whose output gates go by evidence cannot be exported: what they go on from has no place "
            "in the cache of an exported model. Serve it with transformers, or train one without `evidence`."
        )
    models = {HUB: share_weights(hub, adapter), **{name: _plain(expert.model) for name, expert in experts.items()}}
    for name, model in models.items():
        if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
            raise ValueError(f"Model {name!r} is quantised; load it in a floating-point dtype to export it.")
    decoders = {name: find_decoder(model, f"Model {name!r}") for name, model in models.items()}
    mixture = output_mixtures(hub)[adapter] if composition.mixture else None
    mixers: list[Union[Stitch, OutputMixture]] = [stitches[layer] for layer in sorted(stitches, reverse=True)]
    mixers += [] if mixture is None else [mixture]
    dtype = mixers[0].gate.of(HUB).weight.dtype
    standalone_config = StitchExportConfig(
        models={name: model.config.to_dict() for name, model in models.items()},
        schedule=[[layer, kind] for layer, kind in composition.schedule.items()],
        stitch={
            "gate": config.gate,
            "gate_bias": config.gate_bias,
            "r": config.r,
            "projected": composition.projected,
            "dtype": str(dtype).removeprefix("torch."),
        },
        returns={
            name: layer_return_sizes(decoder, token_embeddings(models[name]).weight.device)[0]
            for name, decoder in decoders.items()
        },
        final_modules=None
        if mixture is None
        else {name: ModelHead.of(model, f"Model {name!r}").final_names() for name, model in models.items()},
        dtype=models[HUB].dtype,
    )
    with torch.device("meta"):
        standalone = StitchExportForCausalLM(standalone_config)
    state: dict[str, Tensor] = {}
    first = 0
    for name, decoder in decoders.items():
        inner = f"{decoder.list_name}."
        for key, tensor in decoder.backbone.state_dict().items():
            if key.startswith(inner):
                index, _, rest = key.removeprefix(inner).partition(".")
                state[f"model.layers.{first + int(index)}.{rest}"] = tensor
            else:
                state[f"model.backbones.{PerModel.PREFIX}{name}.{key}"] = tensor
        first += len(decoder.layers)
    active = {HUB, *experts}
    for layer, stitch in stitches.items():
        for key, tensor in stitch.state_dict().items():
            if key.split(".")[1].removeprefix(PerModel.PREFIX) in active:
                state[f"model.stitches.{layer}.{key}"] = tensor
    head = models[HUB].get_output_embeddings()
    state |= {f"lm_head.{key}": tensor for key, tensor in head.state_dict().items()}
    if mixture is not None:
        for key, tensor in mixture.state_dict().items():
            if key.split(".")[1].removeprefix(PerModel.PREFIX) in active:
                state[f"output_mixture.{key}"] = tensor
        for name in experts:
            # A copy: heads that are tied to embeddings are not tied in the checkpoint.
            for key, tensor in models[name].get_output_embeddings().state_dict().items():
                state[f"expert_heads.{PerModel.PREFIX}{name}.{key}"] = tensor.clone()
    standalone.load_state_dict(state, assign=True)  # strict: every weight has a place, every place a weight
    standalone.tie_weights()
    generation_config: Any = getattr(models[HUB], "generation_config", None)
    standalone.generation_config = copy.deepcopy(generation_config)
    standalone.save_pretrained(path, **kwargs)
    card = Path(path, "README.md")
    if not card.exists():  # or it is the user's by now
        card.write_text(_CARD.format(install=how_to_install(), models=", ".join(models)), encoding="utf-8")
    source = getattr(models[HUB].config, "_name_or_path", "")
    if os.path.isdir(source) and os.path.isfile(os.path.join(source, "tokenizer_config.json")):
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(path)


def _plain(model: CausalLM) -> PreTrainedModel:
    """The model itself; of a LoRA expert, a copy with the LoRA merged in (equal up to rounding)."""
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
