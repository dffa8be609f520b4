"""What is refused by the configs alone, and what the plugin does in a vLLM that it does not know."""

import sys
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from peft_bts.export.config import StitchExportConfig
from peft_bts.serving.limits import CompositionLimits
from peft_bts.serving.plugin import register
from tests.vllm.engine import HUB, assert_same, stitched, tiny_model


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
LONG = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 64,
    },
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": DYNAMIC}


def check(arch, processes=1, longest=256, **options):
    """What vLLM does with a hub of llama and an expert of this architecture, before it makes any model."""
    models = {"hub": AutoConfig.for_model("llama", **SIZES), "code": AutoConfig.for_model(arch, **SIZES | options)}
    config = StitchExportConfig(models={name: model.to_dict() for name, model in models.items()})
    CompositionLimits.verify_and_update_config(
        SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config, quantization=None, max_model_len=longest),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=processes),
            lora_config=None,
            speculative_config=None,
        )
    )


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("phi3", LONG, "longrope.*--max-model-len 64"),
        ("llama", {"rope_parameters": DYNAMIC}, "type dynamic"),
        ("gemma3_text", {"rope_parameters": NESTED}, "type dynamic"),
        ("gemma4_text", {"head_dim": 32, "global_head_dim": 64, "num_hidden_layers": 6}, "shapes in some layers"),
        ("phimoe", {}, "layers that return something else"),
    ],
    ids=["longrope", "dynamic", "dynamic_in_some_layers", "gemma4", "phimoe"],
)
def test_refused_models(arch, options, message):
    with pytest.raises(ValueError, match=f"Model 'code' .*{message}"):
        check(arch, **options)


def test_longrope_within_its_short_factors(tmp_path):
    check("phi3", longest=64, **LONG)
    with pytest.raises(ValueError, match="longrope"):
        check("phi3", longest=65, **LONG)
    model = stitched(tiny_model("llama", **HUB), {"code": tiny_model("phi3", seed=1, **HUB | LONG)})
    assert_same(model, tmp_path, max_model_len=64)


@pytest.mark.parametrize(
    ("heads", "processes", "message"),
    [
        ({"num_attention_heads": 2}, 4, "2 attention heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, 4, None),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, 4, None),  # key-value heads may be copied
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}, 4, "3 key-value heads"),
    ],
    ids=["too_few", "split", "copied", "odd"],
)
def test_heads_and_processes(heads, processes, message):
    if message is None:
        check("llama", processes, **heads)
    else:
        with pytest.raises(ValueError, match=message):
            check("llama", processes, **heads)


def test_another_version_of_vllm_still_serves_other_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.transformers_utils.model_arch_config_convertor", None)
    with pytest.warns(UserWarning, match=r"vllm>=0\.32"):
        register()
