"""Caches that quantise, live elsewhere or have windows: exact, or refused before anything is computed."""

from functools import partial

import pytest
import torch
import transformers
from packaging import version
from transformers import DynamicCache, QuantizedCache, StaticCache

from tests.helpers.caches import Device
from tests.helpers.generation import (
    NEW,
    error_of,
    greedily,
    members,
    model_of,
    new_model,
    reference_tokens,
    refuses,
    tokens,
    uncached,
)
from tests.helpers.models import IDS, assert_near, fresh, logits, pristine, stitch


# ----------------------------------------------------------------------------- caches that quantise, or live elsewhere


QUANTISED = {
    "fp8": {},
    "quanto": {"residual_length": 4, "q_group_size": 8},
    "hqq": {"residual_length": 4, "q_group_size": 8, "axis_key": 1, "axis_value": 1},
}


def quantised(backend, config):
    try:
        return QuantizedCache(backend=backend, config=config, **QUANTISED[backend])
    except ImportError as error:
        pytest.skip(str(error))
    except ValueError as error:
        if "Unknown" in str(error):  # fp8 came with transformers 5.2x
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "qwen3_moe", "llama<gpt2+falcon", "bloom<falcon+llama", "llama<gpt2+falcon@0"]
)
@pytest.mark.parametrize("backend", QUANTISED)
def test_quantised_cache(backend, name):
    """Quantising loses bits, so the model without a cache is no measure: each model quantises as it would alone."""
    model = model_of(name)
    expected = reference_tokens(model, name, make_cache=partial(quantised, backend))
    assert torch.equal(tokens(model, past_key_values=quantised(backend, model.config)), expected)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **QUANTISED[backend]}}
    assert torch.equal(tokens(model, **options), expected)
    assert torch.equal(tokens(model, prefill_chunk_size=IDS.shape[1], **options), expected)


@pytest.mark.parametrize("name", ["llama<mistral+gpt2", "llama<qwen3_next+gpt2", "gpt2<mistral+llama"])
def test_quantised_cache_beside_windows(name):
    """transformers quantises full attention only; an expert without it is named, before anything is computed."""
    model = model_of(name)
    own = quantised("fp8", model.config)
    refuses(model, "'[ab]'", lambda: tokens(model, past_key_values=own))
    assert own.get_seq_length() == 0


OLD_BLOOM = version.parse(transformers.__version__) < version.parse("5.23")
OFFLOADABLE = ["llama", "gpt2", "gemma3_text", "llama<mistral+gpt2", "llama<qwen3_next+gpt2", "opt<gpt_oss+bloom"]
OFFLOADABLE += ["llama@0", "llama<mistral+gpt2@2"]


@pytest.mark.parametrize("name", [*OFFLOADABLE, "mistral"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache(kind, name, monkeypatch):
    """Every layer's states are back on the device when its model needs them (on a device that is made up)."""
    if "bloom" in name and kind == "offloaded_static" and OLD_BLOOM:
        pytest.skip("Bloom of transformers 5.18 takes no static cache, alone either")
    model, plain = model_of(name), pristine(members(name)[0])
    device = Device(monkeypatch)
    if error := error_of(lambda: tokens(plain, cache_implementation=kind)):  # transformers: windows only, static
        with pytest.raises(type(error)):
            tokens(model, cache_implementation=kind)
        return
    device.away = 0
    assert torch.equal(tokens(model, cache_implementation=kind), greedily(name))
    assert device.away > NEW


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OFFLOADABLE)
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache_on_a_gpu(kind, name):
    model = new_model(name).to("cuda")
    options = {"cache_implementation": kind, "disable_compile": True}
    assert torch.equal(tokens(model, IDS.cuda(), **options), uncached(model, IDS.cuda()))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("expert", ["llama", "gpt2", "gemma3_text", "qwen3_next"])
def test_static_cache_of_a_hub_that_sees_less_than_its_expert(expert):
    """The static cache of a hub with windows only does not know how long the text may be: no guess is made."""
    model = new_model(f"mistral<{expert}+mistral")
    refuses(model, "sliding", lambda: tokens(model, cache_implementation="static"))
    own = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        refuses(model, "(?i)sliding|window", lambda: model(input_ids=IDS, past_key_values=own))


@pytest.mark.parametrize("window", [2, 8])
def test_static_cache_of_a_hub_with_another_window(window):
    model = stitch(fresh("mistral"), {"a": fresh("mistral", seed=1, sliding_window=window)}, num_stitches=2)
    own = StaticCache(config=model.config, max_cache_len=40)
    ids = IDS
    with torch.no_grad():
        for _ in range(3):
            try:
                step = model(input_ids=ids if ids is IDS else ids[:, -1:], past_key_values=own)
            except ValueError as error:
                assert "window" in str(error) and own.get_seq_length() == 0
                return
            full = logits(model, ids, use_cache=False)
            assert_near(step.logits[:, -1], full[:, -1], 1e-4)
            ids = torch.cat([ids, full[:, -1:].argmax(-1)], dim=1)


def test_a_kind_of_cache_that_no_expert_can_have():
    class OwnCache(DynamicCache):
        pass

    model = model_of("llama")
    own = OwnCache(config=model.config)
    refuses(model, "OwnCache", lambda: tokens(model, past_key_values=own))
    assert own.get_seq_length() == 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_cache_used_while_disabled(when, kind):
    """The experts have not seen those tokens."""
    model = model_of("llama")
    own = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)
    with torch.no_grad():
        if when == "between":
            model(input_ids=IDS, past_key_values=own)
        with model.disable_adapter():
            model(input_ids=IDS[:, :3], past_key_values=own)
        refuses(model, "disabled", lambda: model(input_ids=IDS[:, :2], past_key_values=own))
