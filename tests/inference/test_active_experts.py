"""With some experts active, tokens are those of a model that has no others, and the others do not run."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers.generation import REPEATING, new_model, reference_tokens, refuses, tokens, uncached
from tests.helpers.models import IDS, assert_near, logits


@contextmanager
def calls_of(model, expert):
    """Counts every call of any module of an expert."""
    calls = []
    modules = model.base_model.experts["default"][expert].model.modules()
    hooks = [module.register_forward_pre_hook(lambda module, args: calls.append(module)) for module in modules]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bloom<falcon+llama", "llama<mistral+gpt2", "qwen3_next<mistral+llama"]
)
def test_active_experts(name, pattern):
    """Exact against the reference of just these experts, and the others do not run."""
    model = new_model(name, pattern=pattern, num_stitches=4)
    everyone = reference_tokens(model, name)
    for active, idle in (("a", "b"), ("b", "a")):
        expected = reference_tokens(model, name, only=[active])
        assert not torch.equal(expected, everyone)
        with calls_of(model, idle) as idle_calls, calls_of(model, active) as active_calls:
            with model.set_active_experts([active]):
                assert torch.equal(tokens(model), expected)
                assert torch.equal(uncached(model), expected)
            assert active_calls and not idle_calls
        assert torch.equal(tokens(model), everyone)
    assert torch.equal(uncached(model), everyone)


def test_active_experts_as_a_statement():
    model = new_model("llama")
    alone, everyone = reference_tokens(model, "llama", only=["a"]), reference_tokens(model, "llama")
    model.set_active_experts(["a"])
    assert torch.equal(tokens(model), alone)
    model.set_active_experts(None)
    assert torch.equal(tokens(model), everyone)
    model.set_active_experts("a")
    assert torch.equal(tokens(model), alone)
    with model.set_active_experts(["a", "b"]):
        assert torch.equal(tokens(model), everyone)
        with pytest.raises(RuntimeError, match="stop"), model.set_active_experts(("b",)):
            raise RuntimeError("stop")
        assert torch.equal(tokens(model), everyone)
    assert torch.equal(tokens(model), alone)


def test_experts_that_come_and_go_meanwhile():
    """An expert that is attached takes part and trains, whatever was left out; the last one that is there runs."""
    model = new_model("llama")
    model.set_active_experts(["a"])
    b = model.detach_expert("b")
    only_a = logits(model)
    model.attach_expert("b", b)
    with calls_of(model, "b") as calls:
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert calls and not torch.equal(logits(model.eval()), only_a)
    grads = [p.grad for name, p in model.named_parameters() if ".stitch_layer." in name and "for_b." in name]
    assert grads and all(grad is not None for grad in grads)

    model.set_active_experts(["a"])
    model.detach_expert("a")
    with calls_of(model, "b") as calls:
        logits(model)
    assert calls


@pytest.mark.parametrize("names", [["c"], ["a", "c"], []], ids=str)
def test_active_experts_that_are_none(names):
    model = new_model("llama")
    refuses(model, "expert", lambda: model.set_active_experts(names))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 5}],
    ids=lambda options: next(iter(options)),
)
def test_active_experts_in_every_mode(options):
    """With the recurrent expert left out, even drafts may be taken back."""
    model = new_model("llama<qwen3_next+gpt2")
    ids = REPEATING if "prompt_lookup_num_tokens" in options else IDS
    search = {"num_beams": 3} if "num_beams" in options else {}
    with model.set_active_experts(["b"]):
        assert torch.equal(tokens(model, ids, **options), uncached(model, ids, **search))


@pytest.mark.parametrize(
    "make_cache", [DynamicCache, partial(StaticCache, max_cache_len=32)], ids=["dynamic", "static"]
)
def test_a_cache_of_other_active_experts(make_cache):
    """An expert that was not run has no states in the cache: refused in both directions, and the cache is unharmed."""
    model = new_model("llama")
    for then, now in ((["a"], None), (None, ["a"]), (["a"], ["b"])):
        own = make_cache(config=model.config)
        with torch.no_grad():
            with model.set_active_experts(then):
                model(input_ids=IDS[:, :6], past_key_values=own)
            with model.set_active_experts(now):
                refuses(model, r"experts \['.*empty cache", partial(tokens, model, past_key_values=own))
            with model.set_active_experts(then):
                rest = model(input_ids=IDS[:, 6:], past_key_values=own).logits
                assert_near(rest, logits(model, use_cache=False)[:, 6:], 1e-4)
