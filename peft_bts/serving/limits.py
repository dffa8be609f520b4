"""What a composition cannot be served with: told before any weight is loaded, with what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import iter_rope_parameters

from ..export.config import StitchExportConfig, layer_kinds
from ..forward.decoder import find_decoder, text_config
from .shapes import part_shapes


_KINDS = ("full_attention", "sliding_attention")

# Their attention goes through transformers' interface, but not with the shapes that vLLM's takes and gives.
_OTHER_SHAPES = ("gpt2", "gpt_bigcode")
_OTHER_LAYERS = ("phimoe",)


class CompositionLimits(VerifyAndUpdateConfig):
    """What vLLM asks when it has read all options and configs, before it starts a process or makes a model."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise `ValueError` for a way of serving, or a config of a model, that compositions cannot be served with."""
        config: StitchExportConfig = vllm_config.model_config.hf_config
        parallel, quantization = vllm_config.parallel_config, vllm_config.model_config.quantization
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                f"A stitched model cannot be served with pipeline_parallel_size={parallel.pipeline_parallel_size}: "
                "its models run side by side, so there is no order to cut them in. Use --tensor-parallel-size."
            )
        if quantization is not None:
            raise ValueError(
                f"A stitched model cannot be served quantised (quantization={quantization!r}): "
                "serve it in bfloat16, without --quantization."
            )
        if vllm_config.lora_config is not None:
            raise ValueError(
                "A stitched model cannot be served with LoRA adapters (--enable-lora). Export the model with the LoRA "
                "attached as an expert: `model.export` merges it."
            )
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "A stitched model cannot be served with speculative decoding: drafts are checked on the hidden states "
                "of one model. Leave out --speculative-config."
            )
        for name, shape in zip(config.names, part_shapes(config)):
            _check_model(name, config, shape, parallel.tensor_parallel_size)
            _check_positions(name, config, vllm_config.model_config.max_model_len)


def _check_model(name: str, config: StitchExportConfig, shape: Any, processes: int) -> None:
    own = config.part(name).get_text_config(decoder=True)
    if own.model_type in _OTHER_LAYERS:
        raise ValueError(
            f"Model {name!r} ({own.model_type}) has layers that return something else in vLLM than in transformers. "
            "Serve the stitched model with transformers."
        )
    unknown = sorted(set(layer_kinds(own)).difference(_KINDS))
    if unknown:
        raise ValueError(
            f"Model {name!r} ({own.model_type}) has layers of kind {', '.join(unknown)}, which vLLM cannot run inside "
            "of a stitched model: all of its layers must have full or sliding-window attention. Serve the stitched "
            "model with transformers."
        )
    if shape.is_deepseek_mla:
        raise ValueError(
            f"Model {name!r} ({own.model_type}) has latent attention (MLA), for which vLLM has a cache of its own; it "
            "cannot be served inside of a stitched model. Serve the stitched model with transformers."
        )
    if shape.per_layer_overrides:
        raise ValueError(
            f"Model {name!r} ({own.model_type}) has attention of other shapes in some layers than in others, which "
            "cannot be served inside of a stitched model. Serve the stitched model with transformers."
        )
    # vLLM copies key-value heads where there are more processes than heads, but not the others.
    heads, kv_heads = shape.total_num_attention_heads, shape.total_num_kv_heads
    kv_fit = kv_heads % processes == 0 or processes % kv_heads == 0
    for what, count, fits in (("attention", heads, heads % processes == 0), ("key-value", kv_heads, kv_fit)):
        if not fits:
            raise ValueError(
                f"Model {name!r} ({own.model_type}) has {count} {what} heads, which cannot be split over "
                f"tensor_parallel_size={processes} processes. Choose a number that divides those of all models."
            )


def _check_positions(name: str, config: StitchExportConfig, longest: int) -> None:
    """vLLM runs many requests as one row; transformers would take the factors of its longest for all of them."""
    own = config.part(name).get_text_config(decoder=True)
    for rope in iter_rope_parameters(own):
        kind, original = rope.get("rope_type", "default"), rope.get("original_max_position_embeddings")
        if kind != "longrope" and "dynamic" not in kind:
            continue
        if kind == "longrope" and original is not None and longest <= original:
            continue
        shorter = f", or with --max-model-len {original}" if kind == "longrope" and original else ""
        raise ValueError(
            f"Model {name!r} ({own.model_type}) has rotary embeddings of type {kind}, which change with the length of "
            "a sequence: in vLLM, short requests would get those of the longest one beside them. Serve the stitched "
            f"model with transformers{shorter}."
        )


def check_layers(config: StitchExportConfig) -> None:
    """Raise `ValueError` for a model whose layers do not go through transformers' attention interface.

    The code of the layers tells, in models without weights: as vLLM would make them, some could not even be made.
    """
    for name in config.names:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.part(name))
        layers, architecture = find_decoder(model, f"Model {name!r}").layers, text_config(model).model_type
        if architecture in _OTHER_SHAPES or not all(any(map(_dispatches, layer.modules())) for layer in layers):
            raise ValueError(
                f"Model {name!r} ({architecture}) cannot be served by vLLM: its attention does not go through "
                "transformers' attention interface, or not as vLLM's does. Serve the stitched model with "
                "transformers, or use a model of an architecture that does, such as llama, qwen, mistral or gemma."
            )


def _dispatches(module: nn.Module) -> bool:
    # Here, since all processes of vLLM import this file, and the backend needs not be in all of them.
    from vllm.model_executor.models.transformers.fusers.attention import interface_call

    return isinstance(getattr(module, "layer_idx", None), int) and interface_call(type(module).forward) is not None
