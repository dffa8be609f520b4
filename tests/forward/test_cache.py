"""Generating with the cache gives what generating without it gives, and a cache that cannot be right is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from tests.helpers.models import FAMILIES, IDS, LEFT, MASKS, assert_near, cache_layers, fresh, logits, stitch
from tests.helpers.zoo import ARCHITECTURES


NEW = 8
STATEFUL = ["qwen3_next", "lfm2", "bamba"]  # transformers: with such layers a cache takes on one token at a time
OPTIONS = {
    "stitched": {},
    "mixture": {"output": "mixture", "num_stitches": 2},
    "gates": {"output": "mixture", "num_stitches": 0},
}
EXPERTS = {"a": ("llama", {"seed": 1, "layers": 6}), "b": ("gpt2", {"seed": 2, "layers": 3, "width": 48})}


def stitched(arch="llama", experts=EXPERTS, **options):
    return stitch(fresh(arch), {name: fresh(other, **kwargs) for name, (other, kwargs) in experts.items()}, **options)


def pair(arch, **options):
    """A stitched model of which hub and first expert are of this architecture."""
    return stitched(arch, {"a": (arch, {"seed": 1, "layers": 6}), "b": EXPERTS["b"]}, **options)


def generate(model, input_ids=IDS, **kwargs):
    """Greedy, unless told otherwise: tokens and the logits that each new one was chosen by."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "use_cache": True} | kwargs
    return model.generate(input_ids=input_ids, return_dict_in_generate=True, **options)


def same(actual, expected, tolerance=1e-3):
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits), tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy(arch, options):
    """Token for token what the model without a cache says, in a left-padded batch: every generate() relies on it."""
    model = pair(arch, **OPTIONS[options])
    same(generate(model, attention_mask=LEFT), generate(model, attention_mask=LEFT, use_cache=False))


@pytest.mark.parametrize("i", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_greedy_with_mixed_architectures(i):
    """Each model keeps states of its own kind: attention, windows, convolutions, recurrences, in one cache."""
    hub, one, two = (ARCHITECTURES[(i + shift) % len(ARCHITECTURES)] for shift in (0, 11, 30))
    model = stitched(hub, {"a": (one, {"seed": 1, "layers": 3}), "b": (two, {"seed": 2, "width": 48})})
    same(generate(model, attention_mask=LEFT), generate(model, attention_mask=LEFT, use_cache=False))


@pytest.mark.parametrize("expert", ["llama", "gpt2", "opt", "bamba", "gptj"])
@pytest.mark.parametrize("hub", ["bloom", "mpt"])
def test_greedy_beside_a_hub_without_positions(hub, expert):
    """A hub with ALiBi gets no position_ids from generate(); its experts still know how far the text is."""
    model = stitched(hub, {"a": (expert, {"seed": 1, "layers": 6})})
    same(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("expert", ["llama", "gpt2", "opt", "bloom", "bamba"])
@pytest.mark.parametrize("hub", ["llama", "gpt2", "bloom", "mpt"])
def test_a_padded_row_is_the_row_alone(hub, expert):
    """Left padding in a batch shifts no model's positions, not even beside a hub that knows no positions."""
    model = stitched(hub, {"a": (expert, {"seed": 1, "layers": 6}), "b": ("llama", {"seed": 2})})
    padded = generate(model, attention_mask=LEFT)
    for row in range(2):
        alone = generate(model, IDS[row : row + 1, LEFT[row].argmax() :])
        assert_near(torch.stack(padded.logits)[:, row], torch.stack(alone.logits)[:, 0], 1e-3)


def in_chunks(model, sizes, cache=None, mask=None, positions=False):
    out, start = [], 0
    for size in sizes:
        stop = start + size
        call = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if positions:
            call["position_ids"] = torch.arange(start, stop)[None]
        with torch.no_grad():
            step = model(input_ids=IDS[:, start:stop], past_key_values=cache, use_cache=True, **call)
        cache, start = step.past_key_values, stop
        out.append(step.logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunks(arch, options):
    """A prompt in two or more forwards is one prompt: chunked prefill, prompt caching, conversations."""
    model = pair(arch, **OPTIONS[options])
    sizes = [7, 1, 1, 1, 1, 1] if arch in STATEFUL else [3, 6, 1, 2]
    positions = arch == "bamba"  # which counts from 0 in every forward, unless told otherwise
    assert_near(in_chunks(model, sizes, positions=positions), logits(model, use_cache=False), 1e-4)


@pytest.mark.parametrize("sizes", [[1] * 12, [11, 1], [5, 7]], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "gpt_neox", "bloom"])
def test_padded_chunks(arch, sizes):
    """Chunks of a left-padded batch: the mask spans what came before."""
    model = pair(arch)
    mask = LEFT.clone()
    mask[:, :1] = 1  # a first chunk that is all padding has nothing to say
    expected = logits(model, attention_mask=mask, use_cache=False)
    real = mask.bool()
    assert_near(in_chunks(model, sizes, mask=mask)[real], expected[real], 1e-4)


@pytest.mark.parametrize("arch", FAMILIES)
def test_beams(arch):
    """Beam search reorders the states of every model, not the hub's alone."""
    model = pair(arch)
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": LEFT, "output_logits": False}
    actual, expected = generate(model, **beams), generate(model, use_cache=False, **beams)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", FAMILIES)
def test_sampling(arch):
    """Several samples per prompt: the same seed draws the same tokens with and without the cache."""
    model = pair(arch)
    options = {"do_sample": True, "num_return_sequences": 3, "attention_mask": LEFT, "top_k": 5}
    torch.manual_seed(0)
    actual = generate(model, **options)
    torch.manual_seed(0)
    same(actual, generate(model, use_cache=False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 5},
        {"cache_implementation": "dynamic"},
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.3},
        {"num_beams": 2, "renormalize_logits": True, "output_logits": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_modes_of_generate(options):
    """Every mode of generate() works unchanged."""
    model = stitched()
    expected = options | {"use_cache": False}
    for cached_only in ("prefill_chunk_size", "cache_implementation"):
        expected.pop(cached_only, None)
    actual, expected = (
        generate(model, attention_mask=LEFT, **options),
        generate(model, attention_mask=LEFT, **expected),
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("expert", ["llama", "gpt2", "qwen2_sliding", "gemma2"])
@pytest.mark.parametrize("hub", ["llama", "qwen2_sliding"])
@pytest.mark.parametrize("role", ["prompt lookup", "target", "assistant"])
def test_rolling_back(role, hub, expert):
    """Assisted generation takes rejected tokens back in every model; a stitched model may also be the assistant."""
    model, seed = stitched(hub, {"a": (expert, {"seed": 1, "layers": 6})}), fresh("llama", seed=5)
    if role == "assistant":
        actual = generate(seed, IDS[:1], assistant_model=model, output_logits=False)
        expected = generate(seed, IDS[:1], use_cache=False)
    else:
        ids = torch.cat([IDS[:1], IDS[:1, :5]], dim=1)  # repeats itself, for prompt lookup to find
        helper = {"assistant_model": seed} if role == "target" else {"prompt_lookup_num_tokens": 2}
        actual = generate(model, ids, output_logits=False, **helper)
        expected = generate(model, ids, use_cache=False)
    assert actual.sequences.tolist() == expected.sequences.tolist()


# Not gpt_neo: transformers itself goes wrong with its static caches.
STATIC = [("llama", expert) for expert in ARCHITECTURES if expert != "gpt_neo"]
STATIC += [
    (hub, expert)
    for hub in ("qwen2_sliding", "mistral", "gemma2", "gpt2")
    for expert in ("llama", "qwen2_sliding", "mistral", "gemma2", "opt", "bloom")
]


@pytest.mark.parametrize(("hub", "expert"), STATIC)
def test_static_cache(hub, expert):
    """A static cache, the one to compile with, is right for any pair of models, or refused in clear words."""
    model = stitched(hub, {"a": (expert, {"seed": 1, "layers": 6}), "b": ("llama", {"seed": 2, "layers": 3})})
    expected = generate(model, attention_mask=LEFT, use_cache=False)
    try:
        actual = generate(model, attention_mask=LEFT, cache_implementation="static")
    except ValueError as error:
        assert hub == "mistral" and "cache" in str(error)  # windows only: what full attention sees cannot be told
    else:
        same(actual, expected)


@pytest.mark.parametrize("turns", [2, 3])
def test_conversation(turns):
    """The cache that generate() returns goes on in the next turn, as if the whole text were new."""
    model = stitched()
    ids, cache = IDS, None
    for turn in range(turns):
        actual = generate(model, ids, past_key_values=cache)
        same(actual, generate(model, ids, use_cache=False))
        cache = actual.past_key_values
        ids = torch.cat([actual.sequences, IDS[:, turn : turn + 4]], dim=1)


def test_copied_prompt_cache():
    """A prefix is computed once, and a copy of its cache goes on with each question."""
    model = stitched()
    with torch.no_grad():
        prefix = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
    for question in (IDS[:, 6:9], IDS[:, 7:12], IDS[:, 6:9]):
        ids = torch.cat([IDS[:, :6], question], dim=1)
        same(generate(model, ids, past_key_values=copy.deepcopy(prefix)), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "opt", "qwen2_sliding"])
def test_cache_without_config(arch):
    """`DynamicCache()`, made without a config, grows layers as they come: each model must find its own."""
    model = pair(arch)
    assert_near(in_chunks(model, [5, 7], DynamicCache()), logits(model, use_cache=False), 1e-4)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS[:, :4], past_key_values=cache)
        model(input_ids=IDS[:, 4:8], past_key_values=cache)
        out = model(input_ids=IDS[:, 8:], past_key_values=cache).logits
    assert_near(out, logits(model, use_cache=False)[:, 8:], 1e-4)


def test_cache_given_to_generate():
    """A cache that the caller made, dynamic or static, is used."""
    model = stitched()
    expected = generate(model, use_cache=False)
    hub = model.get_base_model().config
    for cache in (DynamicCache(), DynamicCache(config=hub), StaticCache(config=hub, max_cache_len=32)):
        same(generate(model, past_key_values=cache), expected)
        assert cache.get_seq_length() == IDS.shape[1] + NEW - 1


def test_crop_reset_and_repeat():
    """What a caller does to the cache happens to every model."""
    model = stitched()
    full = logits(model, use_cache=False)
    cache = DynamicCache()
    in_chunks(model, [9], cache)
    cache.crop(5 - cache.get_seq_length())
    with torch.no_grad():
        assert_near(model(input_ids=IDS[:, 5:], past_key_values=cache).logits, full[:, 5:], 1e-4)
    cache.crop(5 - cache.get_seq_length())
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        out = model(input_ids=IDS[:, 5:].repeat_interleave(2, 0), past_key_values=cache).logits
    assert_near(out, full[:, 5:].repeat_interleave(2, 0), 1e-4)
    cache.crop(5 - cache.get_seq_length())
    cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
    with torch.no_grad():
        out = model(input_ids=IDS[[1, 0, 1, 0], 5:], past_key_values=cache).logits
    assert_near(out, full[[1, 0, 1, 0], 5:], 1e-4)
    static = StaticCache(config=model.get_base_model().config, max_cache_len=16)
    for _ in range(2):
        assert_near(in_chunks(model, [5, 7], static), full, 1e-4)
        static.reset()


def snapshot(cache):
    return [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in vars(layer).items()}
        for layer in cache_layers(cache)
    ]


def unchanged(cache, before):
    now = snapshot(cache)
    assert len(now) == len(before)
    for layer, old in zip(now, before):
        assert layer.keys() == old.keys()
        assert all(
            torch.equal(layer[k], old[k]) if isinstance(old[k], torch.Tensor) else layer[k] == old[k] for k in old
        )


def refused(model, cache, match):
    """The cache is refused, by forward and generate, and neither it nor the model is any different after that."""
    before, expected = snapshot(cache), logits(model)
    for call in (
        lambda: model(input_ids=IDS[:, -1:], past_key_values=cache),
        lambda: generate(model, past_key_values=cache),
    ):
        with pytest.raises(ValueError, match=match):
            call()
        unchanged(cache, before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("arch", FAMILIES)
def test_cache_of_the_hub_alone(arch):
    """A cache filled while the adapter was disabled lacks the experts' states: an error, not nonsense."""
    model = pair(arch)
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        expected = model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
    refused(model, cache, r"12 tokens of the hub alone.*disabled.*empty cache")
    with torch.no_grad(), model.disable_adapter():  # and where it came from it can go on
        assert torch.equal(model(input_ids=IDS[:, :1], past_key_values=cache).logits, expected)


def test_static_cache_of_the_hub_alone():
    """The same with a static cache, which counts its tokens in a tensor."""
    model = stitched()
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=32)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS, past_key_values=cache)
    refused(model, cache, "empty cache")


def test_cache_used_while_disabled():
    """A stitched cache that went on without the stitches has a gap in the experts' states."""
    model = stitched()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        with model.disable_adapter():
            model(input_ids=IDS[:, :3], past_key_values=cache)
    refused(model, cache, r"15 tokens of the hub but 12 of expert 'a'.*empty cache")


def test_cache_of_other_experts():
    """A cache of a model with other experts is refused; the message names both sets."""
    model, other = stitched(), stitched(experts={"a": EXPERTS["a"], "c": EXPERTS["b"]})
    with torch.no_grad():
        cache = other(input_ids=IDS, use_cache=True).past_key_values
    refused(model, cache, r"\['a', 'c'\].*\['a', 'b'\].*empty cache")


@pytest.mark.parametrize("change", ["attach", "detach", "select"])
def test_cache_after_a_change_of_experts(change):
    """Experts that came or went since the cache was filled are noticed."""
    model = stitched()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    if change == "attach":
        model.attach_expert("c", fresh("llama", seed=3))
    elif change == "detach":
        model.detach_expert("b")
    else:
        model.set_active_experts(["a"])
    refused(model, cache, r"\['a', 'b'\].*empty cache")


def test_cache_of_another_adapter():
    """Two adapters with experts of the same names and other models are not one cache's business."""
    model = stitched(experts={"a": EXPERTS["a"]})
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    model.detach_expert("a")
    model.attach_expert("a", fresh("gpt2", seed=3, layers=6))
    refused(model, cache, "empty cache")


def test_unknown_cache():
    """A kind of cache that cannot be made for an expert: the message names it and those that can."""

    class OwnCache(DynamicCache):
        pass

    model = stitched()
    before = logits(model)
    with pytest.raises(ValueError, match=r"OwnCache.*'a'.*DynamicCache, StaticCache"):
        model(input_ids=IDS, past_key_values=OwnCache())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mask", MASKS)
def test_generation_leaves_the_model_alone(mask):
    """After a generation the model computes what it computed before, and keeps no cache."""
    model = stitched()
    before = logits(model, attention_mask=MASKS[mask])
    generate(model, attention_mask=LEFT)
    generate(model, generation_config=GenerationConfig(num_beams=2), output_logits=False)
    assert torch.equal(logits(model, attention_mask=MASKS[mask]), before)


def test_inputs_embeds_then_tokens():
    """generate() from embeddings goes on with token ids, which every model embeds itself."""
    model = stitched(experts={"a": ("llama", {"seed": 1})})
    embeds = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    call = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 1, "do_sample": False}
    first = model.generate(**call)
    assert first.shape == (2, 1)
    out = model.generate(**call | {"max_new_tokens": NEW})
    with torch.no_grad():
        step = model(inputs_embeds=embeds, use_cache=True)
        for i in range(NEW):
            assert torch.equal(step.logits[:, -1].argmax(-1), out[:, i])
            step = model(input_ids=out[:, i : i + 1], past_key_values=step.past_key_values)
