"""Continuous batching gives the tokens of generate(), or a clear refusal."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.helpers.generation import NEW, model_of, tokens, uncached
from tests.helpers.models import IDS, fresh, pristine, stitch


@pytest.fixture
def small_pages(monkeypatch):
    """Continuous batching takes most of the memory there is, unless told how much."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("transformers has no ContinuousBatchingConfig yet")

    class Small(transformers.ContinuousBatchingConfig):
        def __init__(self, **options):
            super().__init__(**{"num_blocks": 32, "max_batch_tokens": 64} | options)

    monkeypatch.setattr("transformers.generation.continuous_batching.continuous_api.ContinuousBatchingConfig", Small)


def results_of(model, prompts):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return model.generate_batch(inputs=prompts, generation_config=transformers.GenerationConfig(**options))


def in_continuous_batches(model, prompts):
    results = results_of(model, prompts)
    assert [result.error for result in results.values()] == [None] * len(prompts)
    return [result.prompt_ids + result.generated_tokens for result in results.values()]


PROMPTS = [IDS[0].tolist(), IDS[1, 3:].tolist(), IDS[1, :7].tolist()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "llama<mistral+gpt2", "llama<qwen3_next+gpt2"])
def test_continuous_batching(name, small_pages):
    """Its paged cache is made for one model. So: the tokens of generate(), or a clear refusal; never other tokens."""
    model = model_of(name)
    try:
        actual = in_continuous_batches(model, PROMPTS)
    except ValueError as error:
        assert "continuous batching" in str(error).lower()
    else:
        assert actual == [uncached(model, torch.tensor([prompt]))[0].tolist() for prompt in PROMPTS]


def test_continuous_batching_through_generate(small_pages):
    model = model_of("llama")
    ids = IDS[:1]
    try:
        actual = tokens(model, ids, cache_implementation="paged", eos_token_id=-1)
    except (ValueError, TypeError) as error:
        assert "continuous batching" in str(error).lower()
    else:
        assert torch.equal(actual.flatten(), uncached(model, ids).flatten())


def test_continuous_batching_of_the_hub(small_pages):
    """With the adapter disabled there is one model only."""
    model = model_of("llama")
    with model.disable_adapter():
        actual = in_continuous_batches(model, PROMPTS)
    assert actual == [uncached(pristine("llama"), torch.tensor([prompt]))[0].tolist() for prompt in PROMPTS]


def exported(path, hub, expert, **options):
    stitch(hub, {"a": expert}, **options).export(path)
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("options", [{}, {"output": "mixture"}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_continuous_batching_of_exported_models(arch, options, small_pages, tmp_path):
    """Their layers have one flat list, so the paged cache holds experts that attend as the hub does."""
    model = exported(tmp_path, fresh(arch), fresh(arch, seed=1, layers=6), **options)
    expected = [uncached(model, torch.tensor([prompt]))[0].tolist() for prompt in PROMPTS]
    assert in_continuous_batches(model, PROMPTS) == expected


@pytest.mark.parametrize("expert", [("qwen3", {}), ("mistral", {}), ("llama", {"width": 64})], ids=str)
def test_continuous_batching_of_other_experts_is_refused(expert, small_pages, tmp_path):
    """The cache has one shape, and masks are made for the hub's layers: an error, and no other tokens."""
    arch, shape = expert
    model = exported(tmp_path, fresh("llama"), fresh(arch, seed=1, **shape))
    with pytest.raises(ValueError, match="Continuous batching keeps"):
        results_of(model, PROMPTS)
