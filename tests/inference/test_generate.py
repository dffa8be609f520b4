"""Every mode of generate() gives, token for token, what full forwards without a cache give; or it is refused first.

Where transformers itself refuses a mode for a plain hub, the stitched model has to refuse it the same way; the tests
find that out by asking the plain hub. What only the stitched model cannot do is spelled out in `why_refused`.
"""

from functools import cache, partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers.generation import (
    MIXED,
    REPEATING,
    SAME,
    STATEFUL,
    check_like_plain,
    error_of,
    everyone,
    greedily,
    leaning,
    members,
    model_of,
    nothing_computed,
    reference_tokens,
    refuses,
    tokens,
    uncached,
)
from tests.helpers.models import IDS, LEFT, fresh, pristine, stitch


# ------------------------------------------------------------------------------------------------------ ways to search


@pytest.mark.parametrize("name", SAME + MIXED)
def test_greedy_is_what_the_reference_says(name):
    """The one test here that does not trust the package's own forward: every other one compares with it."""
    model = model_of(name)
    expected = reference_tokens(model, name)
    assert torch.equal(tokens(model), expected)
    assert torch.equal(greedily(name), expected)


SEARCHES = {
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 9, "temperature": 0.7},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled_beams": {"num_beams": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:, :5]},  # a second stream of forwards, own cache
}


@pytest.mark.parametrize("name", SAME + MIXED)
@pytest.mark.parametrize("search", SEARCHES)
def test_search(search, name):
    model, options = model_of(name), SEARCHES[search]
    assert torch.equal(tokens(model, **options), uncached(model, **options))


REMOTE = {
    "diverse": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low"},
}


@pytest.mark.parametrize("search", REMOTE)
def test_searches_that_transformers_does_not_ship(search):
    """They live in repositories now and run remote code; a stitched model says so just as a plain one does."""
    for model in (pristine("llama"), model_of("llama")):
        with nothing_computed(model), pytest.raises(ValueError, match="trust_remote_code"):
            tokens(model, **REMOTE[search])


def test_no_expert():
    model = stitch(fresh("llama"), {})
    with nothing_computed(model), pytest.raises(ValueError, match="No expert"):
        tokens(model)


# ------------------------------------------------------------------------------------------- kinds of caches and steps


def options_of(how, model):
    return HOW[how](model.config) if callable(HOW[how]) else dict(HOW[how])


HOW = {
    "dynamic_given": lambda config: {"past_key_values": DynamicCache(config=config)},
    "dynamic_without_config": lambda config: {"past_key_values": DynamicCache()},
    "static": {"cache_implementation": "static"},
    "static_given": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=64)},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "chunked_static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lookup_without_config": lambda config: {"prompt_lookup_num_tokens": 3, "past_key_values": DynamicCache()},
    "assistant": lambda config: {"assistant_model": pristine("llama", layers=2, seed=9)},
}
ROLLBACK = {"lookup", "lookup_without_config", "assistant"}
STATIC = {"static", "static_given", "chunked_static"}


def why_refused(how, name):
    """The message with which the stitched model alone refuses this, or `None`."""
    hub, experts = members(name)
    if how in ROLLBACK and STATEFUL & set(experts):
        return "(?i)stateful|roll"
    if how in STATIC and hub == "mistral" and set(experts) != {"mistral"}:
        return "sliding"
    return None


@cache
def hub_refuses(how, hub):
    """The error that the plain hub raises, if transformers does not allow it this mode."""
    model = fresh(hub)
    return error_of(lambda: tokens(model, REPEATING if how in ROLLBACK else IDS, **options_of(how, model)))


@pytest.mark.parametrize("name", SAME + MIXED)
@pytest.mark.parametrize("how", HOW)
def test_how(how, name):
    hub, ids = members(name)[0], REPEATING if how in ROLLBACK else IDS
    options = partial(options_of, how, pristine(hub))
    if error := hub_refuses(how, hub):
        with pytest.raises((type(error), ValueError)):
            tokens(model_of(name), ids, **options())
    elif message := why_refused(how, name):
        refuses(model_of(name), message, lambda: tokens(model_of(name), ids, **options()))
    else:

        def check(model):
            expected = greedily(name, repeating=ids is REPEATING) if model is model_of(name) else uncached(model, ids)
            assert torch.equal(tokens(model, ids, **options_of(how, model)), expected)

        check_like_plain(check, model_of(name), everyone(name))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom", "llama<mistral+gpt2", "gpt2<mistral+llama"])
def test_static_twice_and_longer(name):
    """The second cache is made as long as the first at least, and a longer text than before must fit as well."""

    def check(model):
        for ids, beams in ((IDS[:, :7], 1), (torch.cat([IDS, IDS], dim=1), 1), (IDS, 2), (IDS[:, :5], 1)):
            actual = tokens(model, ids, cache_implementation="static", num_beams=beams)
            assert torch.equal(actual, uncached(model, ids, num_beams=beams))

    check_like_plain(check, model_of(name), everyone(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2<mistral+llama", "llama<qwen3_next+gpt2", "qwen3_next"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset(kind, name):
    """One cache object serves text after text."""

    def check(model):
        config = model.config
        own = StaticCache(config=config, max_cache_len=40) if kind == "static" else DynamicCache(config=config)
        for ids in (IDS, IDS[:, 2:9]):
            assert torch.equal(tokens(model, ids, past_key_values=own), uncached(model, ids))
            own.reset()

    check_like_plain(check, model_of(name), everyone(name))


# ------------------------------------------------------------------------------------------- batches and conversations


@pytest.mark.parametrize("name", SAME + MIXED)
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}],
    ids=["dynamic", "static", "chunks"],
)
def test_a_left_padded_row_is_the_row_alone(options, name):
    if "cache_implementation" in options and why_refused("static", name):
        pytest.skip("no static cache")

    def check(model):
        padded = tokens(model, attention_mask=LEFT, **options)
        for row in range(2):
            start, shared = int(LEFT[row].argmax()), model is model_of(name)
            ids = IDS[row : row + 1, start:]
            expected = greedily(name, row=row, start=start) if shared else uncached(model, ids)
            assert torch.equal(padded[row : row + 1, start:], expected)

    check_like_plain(check, model_of(name), everyone(name))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom", "llama<qwen3_next+gpt2"])
def test_left_padded_beams(name):
    model = model_of(name)
    padded = tokens(model, attention_mask=LEFT, num_beams=3)
    for row in range(2):
        start = int(LEFT[row].argmax())
        alone = tokens(model, IDS[row : row + 1, start:], num_beams=3)
        assert torch.equal(padded[row : row + 1, start:], alone)


@pytest.mark.parametrize("name", SAME + MIXED)
def test_conversation(name):
    """The returned cache takes the next turn, of more than one token."""

    def check(model):
        ids, past = IDS, None
        for turn in range(3):
            actual = tokens(model, ids, past_key_values=past, return_dict_in_generate=True)
            assert torch.equal(actual.sequences, uncached(model, ids))
            past, ids = actual.past_key_values, torch.cat([actual.sequences, IDS[:, turn : turn + 3]], dim=1)
        assert past.get_seq_length() == ids.shape[1] - 4

    check_like_plain(check, model_of(name), everyone(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2<mistral+llama", "opt<gpt_oss+bloom"])
@pytest.mark.parametrize("first", ["lookup", "assistant", "static_given"])
def test_conversation_after_other_modes(first, name):
    """The cache of a drafted turn, or a static one, takes the next turns as well.

    (Drafts for a cache that is not empty go wrong in transformers itself: plain models, too, see the text twice.)
    """

    def check(model):
        ids, options = REPEATING, options_of(first, model)
        for turn in range(3):
            actual = tokens(model, ids, return_dict_in_generate=True, **options)
            assert torch.equal(actual.sequences, uncached(model, ids))
            ids = torch.cat([actual.sequences, REPEATING[:, turn : turn + 3]], dim=1)
            options = {"past_key_values": actual.past_key_values}

    check_like_plain(check, leaning(name), everyone(name))
