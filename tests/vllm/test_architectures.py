"""Compositions of many architectures in vLLM: all log probabilities are those of the adapter's own model."""

import pytest

from tests.vllm.engine import HUB, assert_same, engine, of_architectures, stitched, tiny_model


ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "olmo3",
    "smollm3",
    "cohere",
    "cohere2",
    "granite",
    "stablelm",
    "starcoder2",
    "nemotron",
    "gpt_neox",
    "opt",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
]


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_as_hub_and_as_expert(number, tmp_path):
    """Each architecture is a hub once, a shallow and wide expert once, and a deep and narrow expert once."""
    hub, shallow, deep = (ARCHITECTURES[(number + step) % len(ARCHITECTURES)] for step in (0, 5, 11))
    assert_same(of_architectures(hub, shallow, deep), tmp_path)


INTERFACE = "does not go through transformers' attention interface"
REFUSED = {
    "gpt2": INTERFACE,
    "gpt_bigcode": INTERFACE,
    "gpt_neo": INTERFACE,
    "gptj": INTERFACE,
    "bloom": INTERFACE,
    "falcon": INTERFACE,
    "mpt": INTERFACE,
    "codegen": INTERFACE,
    "deepseek_v3": "has latent attention",
    "qwen3_next": "has layers of kind linear_attention",
    "lfm2": "has layers of kind conv",
    "bamba": "has layers of kind",
}


@pytest.mark.parametrize("arch", REFUSED)
@pytest.mark.parametrize("role", ["hub", "expert"])
def test_what_vllm_cannot_run_is_refused(arch, role, tmp_path):
    names = ("llama", arch) if role == "expert" else (arch, "llama")
    hub, expert = (tiny_model(name, **HUB) for name in names)
    stitched(hub, {"code": expert}).export(tmp_path)
    named = "hub" if role == "hub" else "code"
    with pytest.raises(ValueError, match=f"Model '{named}'.*{REFUSED[arch]}"), engine(tmp_path):
        pass
