"""`generate(draft="hub")`: the hub drafts, and nothing but the number of forwards is different."""

from collections import Counter

import pytest
import torch
from transformers import DynamicCache

from benchmarks import drafts
from peft_bts.inference import generate as generation
from tests.helpers.generation import REPEATING, leaning, model_of, refuses, tokens, uncached
from tests.helpers.models import IDS, LEFT


@pytest.fixture
def assistants(monkeypatch):
    """The assistants that are made."""
    made, make = [], generation._drafting_hub

    def note(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(generation, "_drafting_hub", note)
    return made


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3_text", "gpt2", "llama<mistral+gpt2", "gpt2<mistral+llama@0"]
)
def test_greedy_tokens(name, assistants):
    """As without drafts, in fewer forwards, by a hub that has no weights of its own."""
    model = leaning(name)
    rounds = drafts.Rounds(model)
    options = {"max_new_tokens": 24, "draft": "hub"}
    made, forwards = rounds.generate(IDS[:1], do_sample=False, **options)
    assert made == 24 and 1 < forwards.total() < 24 and max(forwards) == generation.DRAFT_TOKENS
    assert torch.equal(tokens(model, IDS[:1], **options), uncached(model, IDS[:1], max_new_tokens=24))
    weights = {p.data_ptr() for p in model.get_base_model().parameters()}
    assert {p.data_ptr() for p in assistants[0].parameters()} <= weights
    assert not any("stitch" in name for name, _ in assistants[0].named_modules())


def test_how_many_are_drafted():
    rounds = drafts.Rounds(leaning("llama"))
    options = {"max_new_tokens": 24, "do_sample": False, "draft": "hub"}
    _, forwards = rounds.generate(IDS[:1], num_assistant_tokens=5, **options)
    assert max(forwards) == 5
    _, fewer = rounds.generate(IDS[:1], num_assistant_tokens=5, assistant_confidence_threshold=0.9, **options)
    assert max(fewer) < 5
    _, forwards = rounds.generate(IDS[:1], **options)
    assert max(forwards) == generation.DRAFT_TOKENS


@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution():
    """The first two of them, against the distribution that full forwards give: 600 draws from up to nine pairs."""
    model, draws = leaning("llama"), 600
    options = {"top_k": 3, "temperature": 0.7}
    torch.manual_seed(0)
    found = Counter()
    for _ in range(draws):
        ids = model.generate(input_ids=IDS[:1], do_sample=True, max_new_tokens=3, draft="hub", **options)
        found[tuple(ids[0, IDS.shape[1] : IDS.shape[1] + 2].tolist())] += 1
    expected = pairs(model, **options)
    assert found.keys() <= expected.keys()
    distance = sum(abs(found[pair] / draws - p) for pair, p in expected.items()) / 2
    # Of nine frequencies, the expected distance is below sqrt(9 / (2 pi * draws)) = 0.05; the hub's own is far off.
    drafted_alone = pairs(model, disabled=True, **options)
    assert distance < 0.08 < sum(abs(drafted_alone.get(pair, 0) - p) for pair, p in expected.items()) / 2


@torch.no_grad()
def pairs(model, top_k, temperature, disabled=False):
    """Probabilities of the next two tokens."""

    def following(ids):
        if disabled:
            with model.disable_adapter():
                logits = model(input_ids=ids).logits[:, -1]
        else:
            logits = model(input_ids=ids).logits[:, -1]
        values, places = (logits / temperature).topk(top_k)
        return zip(places[0].tolist(), values.softmax(-1)[0].tolist())

    return {
        (a, b): p * q
        for a, p in following(IDS[:1])
        for b, q in following(torch.cat([IDS[:1], torch.tensor([[a]])], dim=1))
    }


def test_the_hub_alone_needs_no_drafts(assistants):
    model = leaning("llama")
    with model.disable_adapter():
        assert torch.equal(tokens(model, IDS[:1], draft="hub"), tokens(model, IDS[:1]))
    assert not assistants


def test_refused():
    model = leaning("llama")
    refuses(model, "draft must be 'hub'", lambda: tokens(model, IDS[:1], draft="code"))
    refuses(model, "only one can draft", lambda: tokens(model, REPEATING, draft="hub", prompt_lookup_num_tokens=2))
    refuses(model, "with drafts", lambda: tokens(model, IDS[:1], draft="hub", max_active_experts=1))
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:1], past_key_values=cache)
    refuses(model, "starts with an empty cache", lambda: tokens(model, IDS[:1], draft="hub", past_key_values=cache))
    refuses(model, "batch_size = 1", lambda: tokens(model, IDS, attention_mask=LEFT, draft="hub"))
    stateful = model_of("llama<qwen3_next+gpt2")
    refuses(stateful, "stateful", lambda: tokens(stateful, IDS[:1], draft="hub"))


def test_gain():
    """Two rounds with two drafts give five tokens: 2 * (2 * 0.25 + 1.5) against 5."""
    row = {"tokens": 5, "forwards": {"2": 2}}
    assert drafts.gain(row, {"1": 1.0, "3": 1.5, "hub": 0.25}) == 5 / 4
