"""Attention masks that were made for the hub: experts see what they would with the padding alone, or are refused.

generate() makes such masks for static caches, (B, 1, queries, keys) or a dict of them by kind of layer. Here they are
made by hand, or taken from generate(); what is expected comes from plain models and plain 2D masks.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bts.forward.masks import check_mask, expert_mask, is_text
from tests.helpers.bad_input import refused
from tests.helpers.models import IDS, LEFT, MASKS, RIGHT, assert_near, expected_logits, fresh, logits, pristine, stitch
from tests.helpers.zoo import tiny_config


QUERIES = IDS.shape[1]
SEES_OTHERWISE = ["gpt2", "bloom", "mistral", "gemma3_text"]  # than a llama: other attention, biases, windows


def causal(mask, dtype=torch.bool):
    """A prepared mask, by hand: every query sees the tokens so far, (B, 1, queries, keys)."""
    sees = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    return sees if dtype == torch.bool else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(dtype).min)


def configured(arch, **options):
    config = tiny_config(arch, **options)
    config._attn_implementation = "sdpa"
    return config


# --------------------------------------------------------------------------------------------------- in whole forwards


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["boolean", "added"])
@pytest.mark.parametrize(
    ("expert", "padding"), [("llama", "right"), *((arch, "left") for arch in ["llama", *SEES_OTHERWISE])]
)
def test_a_prepared_mask_is_as_good_as_the_padding(expert, padding, dtype):
    """Wherever there is text, logits are those that plain models give with the tokenizer's mask."""
    model = stitch(fresh("llama"), {"a": fresh(expert, seed=1)}, num_stitches=2)
    expected = expected_logits(
        model, pristine("llama"), {"a": pristine(expert, seed=1)}, attention_mask=MASKS[padding]
    )
    actual = logits(model, attention_mask=causal(MASKS[padding], dtype))
    text = MASKS[padding].bool()
    assert_near(actual[text], expected[text], 1e-4)


def test_an_expert_that_sees_as_the_hub_does_gets_any_mask():
    """Rows packed of two documents: a mask of blocks reaches hub and expert as it is."""
    document = torch.arange(QUERIES) // 5
    mask = causal(torch.ones_like(IDS)) & (document[:, None] == document)
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, num_stitches=2)
    expected = expected_logits(model, pristine("llama"), {"a": pristine("llama", seed=1)}, attention_mask=mask)
    assert_near(logits(model, attention_mask=mask), expected, 1e-4)
    assert not torch.allclose(logits(model), expected, atol=1e-2)  # that the blocks matter


@pytest.mark.parametrize("expert", SEES_OTHERWISE)
def test_masks_that_an_expert_cannot_be_given(expert):
    """One that hides some of the text says more than padding: refused by name, before anything is computed."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=2), "other": fresh(expert, seed=1)}, num_stitches=2)
    mask = causal(LEFT)
    mask[:, :, -1, 6] = False
    with refused(model, match=rf"(?s)attention mask.*llama.*'other' \({expert}\).*more than the future and padding"):
        model(input_ids=IDS, attention_mask=mask)
    mask = causal(LEFT)
    mask[:, :, 8, 10] = True  # a look into the future
    with refused(model, match="more than the future and padding"):
        model(input_ids=IDS, attention_mask=mask)
    with refused(model, match="padding on the right cannot be told from it"):
        model(input_ids=IDS, attention_mask=causal(RIGHT))


def test_masks_of_a_hub_with_windows_only():
    """The padding behind the window is not in the hub's mask; an expert that sees further cannot be told."""
    model = stitch(fresh("mistral"), {"a": fresh("llama", seed=1)}, num_stitches=2)
    with refused(model, match=r"(?s)'a' \(llama\).*all layers of the hub have a sliding window.*2D mask"):
        model(input_ids=IDS, attention_mask=causal(LEFT))


@pytest.mark.parametrize("hub", ["llama", "gemma3_text"])
@pytest.mark.parametrize("expert", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_masks_of_generate(hub, expert):
    """A static cache and padding: a step over the whole prompt and steps of one token, as without a cache."""
    model = stitch(fresh(hub), {"a": fresh(expert, seed=1)}, num_stitches=2)
    options = {"attention_mask": LEFT, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=IDS, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=IDS, cache_implementation="static", **options), expected)


# -------------------------------------------------------------------------------------------------------- mask by mask


@settings(max_examples=60, deadline=None)
@given(real=st.lists(st.integers(2, QUERIES), min_size=1, max_size=3), data=st.data())
def test_the_padding_is_recovered(real, data):
    """Whatever it is, on the left; and no mask with a bit changed in the text passes for a causal one."""
    hub, expert = configured("llama"), configured("gpt2")
    mask = (torch.arange(QUERIES) >= QUERIES - torch.tensor(real)[:, None]).long()
    full = causal(mask)
    check_mask(full, hub, expert, "a")
    assert torch.equal(expert_mask(full, hub, expert, 0, QUERIES), mask)

    row = data.draw(st.integers(0, len(real) - 1))
    text = range(QUERIES - real[row], QUERIES)
    query, key = data.draw(st.sampled_from(text[:-1])), data.draw(st.sampled_from(text))  # the last query's row counts
    full[row, 0, query, key] ^= True
    with pytest.raises(ValueError, match="more than the future and padding"):
        check_mask(full, hub, expert, "a")


def masks_of_generate(arch, kernel):
    """What the backbone of a plain model gets from generate() with a static cache: for the prompt, then for tokens."""
    model, masks = fresh(arch), []
    model.set_attn_implementation(kernel)
    note = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.generate(input_ids=IDS, attention_mask=LEFT, cache_implementation="static", max_new_tokens=3)
    note.remove()
    return masks


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_the_padding_in_masks_of_generate(arch, kernel):
    """Boolean for sdpa, added to the logits for eager attention; by kind of layer where there are several."""
    hub, expert = configured(arch), configured("gpt2")
    prompt, *steps = masks_of_generate(arch, kernel)
    assert isinstance(prompt, dict) == (arch == "gemma3_text") and len(steps) == 2
    past, queries, padding = 0, QUERIES, LEFT
    for mask in (prompt, *steps):
        check_mask(mask, hub, expert, "a")
        assert torch.equal(expert_mask(mask, hub, expert, past, queries), padding)
        assert torch.equal(is_text(mask, hub, past, queries), padding[:, past:].bool())
        past, queries, padding = past + queries, 1, torch.nn.functional.pad(padding, (0, 1), value=1)


def test_masks_as_long_as_the_cache():
    """Experts get the padding of the tokens so far; only bloom, whose positions come from it, that of all keys."""
    mask = torch.cat([LEFT, torch.zeros(2, 8, dtype=torch.long)], dim=1)
    hub = configured("llama")
    assert torch.equal(expert_mask(mask, hub, configured("gpt2"), 4, 8), LEFT)
    assert torch.equal(expert_mask(mask, hub, configured("gpt2"), 4, 3), LEFT[:, :7])
    assert torch.equal(expert_mask(mask, hub, configured("bloom"), 4, 8), mask)
    assert torch.equal(expert_mask(mask, hub, configured("gpt2"), None, 8), mask)  # the cache's length is not known
    assert expert_mask(None, hub, configured("gpt2"), 4, 8) is None


def test_which_tokens_are_text():
    """What the mask tells of this call's tokens; nothing where it tells nothing."""
    llama, mistral = configured("llama"), configured("mistral")
    assert torch.equal(is_text(LEFT, llama, 4, 8), LEFT[:, 4:].bool())
    assert is_text(None, llama, 0, 12) is None
    assert is_text(LEFT, llama, 4, 9) is None  # shorter than the text
    assert torch.equal(is_text(causal(LEFT), llama, 0, 12), LEFT.bool())
    assert is_text(causal(LEFT), mistral, 0, 12) is None  # windows hide what is padding
    assert is_text({"full_attention": None}, llama, 0, 12) is None
