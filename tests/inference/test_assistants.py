"""Drafts by an assistant or by prompt lookup: what was wrong in them is taken back from every model's states."""

import pytest
import torch
from transformers import cache_utils

from tests.helpers.generation import (
    NEW,
    REPEATING,
    check_like_plain,
    everyone,
    leaning,
    members,
    model_of,
    refuses,
    tokens,
    uncached,
)
from tests.helpers.models import IDS, assert_near, logits, pristine


ROLLING = [
    "llama",
    "mistral",
    "gemma3_text",
    "gpt2",
    "bloom",
    "gpt_oss",
    "llama<mistral+gpt2",
    "llama<lfm2+deepseek_v3",
    "llama<mistral+gpt2@2",
]


class Forwards:
    """Counts the forwards of a model, and how many tokens its caches were asked to give back."""

    def __init__(self, model, monkeypatch):
        self.calls, self.taken_back = 0, 0
        self._hook = model.register_forward_pre_hook(self._count)
        crop = cache_utils.Cache.crop

        def counting_crop(cache, amount):
            self.taken_back += abs(amount)
            return crop(cache, amount)

        monkeypatch.setattr(cache_utils.Cache, "crop", counting_crop)

    def _count(self, module, args):
        self.calls += 1

    def stop(self):
        self._hook.remove()


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", [*ROLLING, "opt<gpt_oss+bloom", "gemma3_text<llama+mistral", "bloom<falcon+llama"])
def test_with_an_assistant(name, sample, monkeypatch):
    """An assistant that is sometimes right: what it got wrong is taken back from every model's states.

    Drafts change the order in which samples are drawn. So there, each token's logits are held against a forward over
    the whole text, in which nothing was ever taken back.
    """
    model, assistant = leaning(name), pristine(members(name)[0])
    options = {"max_new_tokens": 24, "assistant_model": assistant}
    if sample:
        actual = tokens(model, IDS[:1], do_sample=True, output_logits=True, return_dict_in_generate=True, **options)
        expected = logits(model, actual.sequences, use_cache=False)[:, IDS.shape[1] - 1 : -1]
        assert_near(torch.stack(actual.logits, dim=1), expected, 1e-4)
        return
    count = Forwards(model.get_base_model(), monkeypatch)
    actual = tokens(model, IDS[:1], **options)
    count.stop()
    assert torch.equal(actual, uncached(model, IDS[:1], max_new_tokens=24))
    assert count.calls < 24, "no draft was ever right: the test shows nothing"
    assert count.taken_back, "no draft was ever wrong: the test shows nothing"


@pytest.mark.parametrize("name", [*ROLLING, "qwen3_next", "llama<qwen3_next+gpt2", "gemma3_text<qwen3_next+llama"])
def test_as_the_assistant(name):
    """A stitched model drafts for its hub, for another stitched model and for itself."""
    assistant = leaning(name)
    own_hub = pristine("llama" if name == "qwen3_next" else members(name)[0])
    for target in (own_hub, leaning("llama"), *([leaning(name)] if name in ROLLING else [])):
        actual = tokens(target, IDS[:1], max_new_tokens=20, assistant_model=assistant)
        assert torch.equal(actual, tokens(target, IDS[:1], max_new_tokens=20))


@pytest.mark.parametrize("name", ["llama<qwen3_next+gpt2", "gemma3_text<qwen3_next+llama", "llama<bamba+llama"])
def test_experts_that_cannot_take_back(name):
    """A recurrence cannot unsee a token: refused, where a plain hub would allow it, and not answered wrongly."""
    model, plain = model_of(name), pristine("llama")
    refuses(model, "(?i)stateful|roll", lambda: tokens(model, REPEATING, prompt_lookup_num_tokens=3))
    refuses(model, "(?i)stateful|roll", lambda: tokens(model, REPEATING, assistant_model=plain))


@pytest.mark.parametrize("name", ["llama", "mistral", "llama<mistral+gpt2"])
def test_assisted_outputs(name):
    """Scores and hidden states come one per token, whatever was drafted."""
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}

    def check(model):
        actual = tokens(model, REPEATING, prompt_lookup_num_tokens=3, **wanted)
        expected = uncached(model, REPEATING, **wanted)
        assert torch.equal(actual.sequences, expected.sequences)
        assert_near(torch.stack(actual.logits), torch.stack(expected.logits), 1e-4)
        assert len(actual.hidden_states) == NEW
        for step, full in zip(actual.hidden_states, expected.hidden_states):
            assert len(step) == len(full) == 5
            for part, whole in zip(step, full):
                assert_near(part[:, -1], whole[:, -1], 1e-4)

    check_like_plain(check, leaning(name), everyone(name))
