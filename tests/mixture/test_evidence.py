"""`evidence=...`: output gates that also see how well each model has predicted the tokens so far."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from peft_bts import StitchConfig, mixture
from tests.helpers.checkpoints import make
from tests.helpers.generation import nothing_computed, refuses
from tests.helpers.models import (
    FAMILIES,
    IDS,
    LEFT,
    MASKS,
    assert_near,
    both,
    expected_logits,
    fresh,
    logits,
    pristine,
    stitch,
)
from tests.helpers.reference import evidence as literal_evidence
from tests.helpers.zoo import ARCHITECTURES


FORGETTING = 0.8
OPTIONS = {"alone": {"num_stitches": 0}, "stitched": {"num_stitches": 2}}
ALONE = {"output": "mixture", "evidence": FORGETTING, "num_stitches": 0}


@pytest.fixture(params=OPTIONS)
def options(request):
    return {"output": "mixture", "evidence": FORGETTING, **OPTIONS[request.param]}


def pair(arch="llama", options=None, *, dtype=torch.float32, **changes):
    """A stitched model with two experts, and what the reference is to be given for it."""
    hub, plain_hub = both(arch, dtype=dtype)
    a, plain_a = both(arch, seed=1, layers=6, width=48, dtype=dtype)
    b, plain_b = both("llama", seed=2, dtype=dtype)
    model = stitch(hub, {"a": a, "b": b}, **(options or ALONE) | changes)
    return model, plain_hub, {"a": plain_a, "b": plain_b}


# ------------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("tokens", [1, 5, 128, 300])
@pytest.mark.parametrize("forgetting", [0.5, 0.95, 1.0])
def test_sums(forgetting, tokens):
    """One token after the other, with padding and texts that begin anywhere, and as two calls."""
    generator = torch.Generator().manual_seed(tokens)
    text = torch.rand(3, tokens, generator=generator) < 0.9
    first = text & (torch.rand(3, tokens, generator=generator) < 0.02)
    told = torch.randn(3, tokens, 4, generator=generator, dtype=torch.float64).abs().neg()
    told[first | ~text] = 0
    before = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    expected, e = [], before
    for t in range(tokens):
        new = torch.where(first[:, t, None], 0.0, forgetting * e) + told[:, t]
        e = torch.where(text[:, t, None], new, e)
        expected.append(e)
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(mixture.evidence(told, text, first, forgetting, before), expected)
    cut = tokens // 2
    if cut:
        one = mixture.evidence(told[:, :cut], text[:, :cut], first[:, :cut], forgetting, before)
        two = mixture.evidence(told[:, cut:], text[:, cut:], first[:, cut:], forgetting, one[:, -1])
        torch.testing.assert_close(torch.cat([one, two], 1), expected)


def sums(told, forgetting):
    """Of one text without padding."""
    text = torch.ones(told.shape[:2], dtype=torch.bool)
    return mixture.evidence(told, text, torch.zeros_like(text), forgetting)


def test_what_a_model_cannot_say_does_not_count_for_ever():
    told = torch.zeros(1, 400, 2)
    told[:, 3, 1] = -torch.inf
    found = sums(told, 0.9)
    assert found.isfinite().all() and found[0, 3, 1] == -100
    assert found[0, -1].abs().max() < 1e-6


@pytest.mark.parametrize("forgetting", [0.8, 1.0])
def test_low_precision(forgetting):
    """Sums of hundreds of tokens stay in float32, under autocast and with gates in half precision."""
    told = -6 * torch.rand(1, 400, 3, generator=torch.Generator().manual_seed(0))
    exact = sums(told.double(), forgetting)
    with torch.autocast("cpu", torch.bfloat16):
        found = sums(told, forgetting)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    gates = mixture.OutputMixture(8, ["a", "b"], forgetting=forgetting, dtype=torch.bfloat16)
    even = torch.full((1, 400, 3), 1 / 3, dtype=torch.bfloat16).log()
    torch.testing.assert_close(gates.with_evidence(even, found).double().exp(), exact.softmax(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch, mask, options):
    model, hub, experts = pair(arch, options)
    call = {"attention_mask": MASKS[mask]}
    real = slice(None) if MASKS[mask] is None else MASKS[mask].bool()
    assert_near(logits(model, **call)[real], expected_logits(model, hub, experts, **call)[real], 2e-4)


@pytest.mark.parametrize("forgetting", [0.3, 1, 1.0])
def test_float64(forgetting, options):
    model, hub, experts = pair(options=options, dtype=torch.float64, evidence=forgetting)
    assert_near(logits(model), expected_logits(model, hub, experts), 1e-6)


def test_packed_texts(options):
    """Position ids that begin anew begin another text, of which those before tell nothing."""
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]])
    model, hub, experts = pair(options=options)
    call = {"input_ids": IDS[:1], "position_ids": places, "use_cache": False}
    found = logits(model, **call)
    assert_near(found, expected_logits(model, hub, experts, IDS[:1], position_ids=places), 2e-4)
    for text in (slice(0, 4), slice(4, 10), slice(10, 12)):
        assert_near(found[:, text], logits(model, IDS[:1, text]), 2e-4)


def test_untrained_gates_average_by_evidence():
    """Without training this is Bayesian model averaging, which forgets: no gate looks at the hub's state."""
    model, hub, experts = pair()
    gates = model.get_base_model().stitch_output["default"]
    with torch.no_grad():
        for parameter in gates.gate.parameters():
            parameter.zero_()
        gates.evidence_weight.fill_(1.0)
    said = {"hub": logits(hub), **{name: logits(expert) for name, expert in experts.items()}}
    told = literal_evidence(said, IDS, FORGETTING)
    weights = torch.stack(list(told.values()), -1).softmax(-1)
    probabilities = torch.stack([of_model.double().softmax(-1) for of_model in said.values()], -1)
    assert_near(logits(model), (probabilities * weights[:, :, None]).sum(-1).log(), 2e-4)


def test_starts_there():
    """So it does start: weight one, and gates of zero."""
    gates = mixture.OutputMixture(8, ["a"], forgetting=0.9)
    assert gates.evidence_weight.tolist() == [1.0]
    assert not any(parameter.any() for parameter in gates.gate.parameters())
    assert not hasattr(mixture.OutputMixture(8, ["a"]), "evidence_weight")


def test_padding_in_the_middle(options):
    """As in a later turn, behind an answer that ended early: it is as if the padding were not there."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]])
    model, hub, experts = pair(options=options)
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    found = logits(model, **call)
    assert_near(found[mask.bool()], expected_logits(model, hub, experts, **call)[mask.bool()], 2e-4)
    for row, text in enumerate(mask.bool()):
        assert_near(found[row, text], logits(model, IDS[row, text][None])[0], 2e-4)
    for sizes in ([5, 1, 1, 5], [1] * 12, [6, 6]):
        actual = steps(model, DynamicCache(config=model.config), sizes, **call)
        assert_near(actual[mask.bool()], found[mask.bool()], 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, options):
    model, hub, experts = pair(options=options, dtype=dtype)
    expected = expected_logits(model, hub, experts)
    assert_near(logits(model), expected, 0.1 if dtype == torch.bfloat16 else 0.0125)


@pytest.mark.parametrize("active", [["a"], ["b"]])
def test_active_experts(active, options):
    model, hub, experts = pair(options=options)
    both_ = logits(model)
    with model.set_active_experts(active):
        some = logits(model)
    other = copy.deepcopy(model)
    for name in experts.keys() - set(active):
        other.detach_expert(name)
    assert_near(some, expected_logits(other, hub, {name: experts[name] for name in active}), 2e-4)
    assert torch.equal(logits(model), both_)


# ------------------------------------------------------------------------------------------------------------- caches


def steps(model, cache, sizes, attention_mask=None, position_ids=None):
    """The logits of the prompts, read in steps of these sizes."""
    mask = attention_mask
    found, start = [], 0
    for size in sizes:
        part = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        if position_ids is not None:
            part["position_ids"] = position_ids[:, start : start + size]
        with torch.no_grad():
            out = model(input_ids=IDS[:, start : start + size], past_key_values=cache, use_cache=True, **part)
        found.append(out.logits)
        start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["full", "left"])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 1, 5], [8, 4]], ids=str)
@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch != "bamba"])  # it takes one token at a time
def test_in_steps(arch, sizes, mask, options):
    """However a text is cut into calls, gates see all of it."""
    model, hub, experts = pair(arch, options)
    places = {} if mask is None or arch == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = expected_logits(model, hub, experts, attention_mask=mask, **places)
    found = steps(model, DynamicCache(config=model.config), sizes, mask, **places)
    real = slice(None) if mask is None else mask.bool()
    assert_near(found[real], expected[real], 2e-4)


def test_static_cache(options):
    model, hub, experts = pair(options=options)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert_near(steps(model, cache, [5, 1, 6]), expected_logits(model, hub, experts), 2e-4)
    cache.reset()
    assert_near(steps(model, cache, [12]), expected_logits(model, hub, experts), 2e-4)


def test_heads_run_once_for_a_token(options):
    """While decoding, what the models said of the next token is kept: no head reads a state twice."""
    model, _, _ = pair(options=options)
    cache = DynamicCache(config=model.config)
    steps(model, cache, [10])
    read = []
    head = model.base_model.experts["default"]["a"].model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: read.append(output.shape[-2]))
    with torch.no_grad():
        model(input_ids=IDS[:, 10:11], past_key_values=cache)
    hook.remove()
    assert sum(read) == len(IDS)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "bamba"])
def test_generate(arch, how, options):
    """The same tokens with a cache as without one."""
    model, _, _ = pair(arch, options)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        call = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 8, **how}
        found.append(model.generate(**call, use_cache=use_cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt_neox", "opt"])
def test_static_cache_in_generate(arch, options):
    """Its masks are made in advance, and as long as the cache: padding is found in them."""
    model, _, _ = pair(arch, options)
    call = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**call, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, model.generate(**call, use_cache=False))


def test_masks_as_long_as_the_cache(options):
    model, _, _ = pair(options=options)
    for mask in (LEFT, torch.ones_like(LEFT)):
        longer = torch.cat([mask, torch.zeros_like(mask[:, :8])], dim=1)
        cache = StaticCache(config=model.config, max_cache_len=20)
        found = logits(model, attention_mask=longer, past_key_values=cache)
        assert_near(found[mask.bool()], logits(model, attention_mask=mask)[mask.bool()], 2e-4)


def test_masks_that_do_not_tell(options):
    """Four dimensions are fine as long as they mask the future and padding on the left alone."""
    model, _, _ = pair(options=options)
    visible = torch.ones(12, 12, dtype=torch.bool).tril() & LEFT[:, None, None].bool()
    found = logits(model, attention_mask=visible)
    assert_near(found[LEFT.bool()], logits(model, attention_mask=LEFT)[LEFT.bool()], 2e-4)
    blocks = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool().tril().expand(2, 1, 12, 12)
    refuses(model, "does not tell which tokens are padding", lambda: model(input_ids=IDS, attention_mask=blocks))


def test_rows_of_a_cache(options):
    """What is done to the sequences of a cache is done to their evidence."""
    model, _, _ = pair(options=options)
    cache = DynamicCache(config=model.config)
    expected = steps(model, cache, [8, 4])[:, 8:]
    changes = {
        "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for change, (argument, rows) in changes.items():
        cache = DynamicCache(config=model.config)
        steps(model, cache, [8])
        getattr(cache, change)(argument)
        with torch.no_grad():
            found = model(input_ids=IDS[rows, 8:], past_key_values=cache).logits
        assert_near(found, expected[rows], 2e-4)


# ----------------------------------------------------------------------------------------------------------- training


def test_gradients(options):
    """Those of the reference, for every weight of the file: evidence is taken as it is."""
    from tests.helpers.models import adapter_file
    from tests.helpers.reference import reference_forward

    model, hub, experts = pair(options=options, dtype=torch.float64)
    tensors, config = adapter_file(model)
    tensors = {key: tensor.double().requires_grad_() for key, tensor in tensors.items()}
    expected = reference_forward(hub, experts, tensors, config, IDS)
    torch.nn.functional.nll_loss(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    model.double()(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {key.replace(".default", "").replace(".for_", "."): grad for key, grad in found.items()}
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_near(found[key], tensor.grad, 1e-6)


@pytest.mark.parametrize("call", [{"logits_to_keep": 1}, {"input_ids": IDS[:, :1]}], ids=["last", "one"])
def test_gradients_do_not_depend_on_the_cache(call, options):
    model, _, _ = pair(options=options)
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(use_cache):
        out = model(**{"input_ids": IDS} | call, use_cache=use_cache)
        return torch.autograd.grad(out.logits[..., 5].sum(), weights, allow_unused=True)

    for with_cache, without in zip(gradients(True), gradients(False)):
        assert (with_cache is None) == (without is None)
        if without is not None:
            torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-5)


def test_trained_saved_loaded(root, tmp_path, options):
    """The file has one tensor more, of one number, which training changes; a fresh model says the same."""
    from peft import PeftModel
    from safetensors.torch import load_file

    from tests.helpers.checkpoints import load

    model = make(root, **options)
    key = "base_model.model.stitch_output.evidence_weight"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[key].shape == (1,) and tensors[key].dtype == torch.float32
    again = PeftModel.from_pretrained(load(root, "seed"), tmp_path).eval()
    assert again.peft_config["default"].evidence == FORGETTING
    assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------------------------------- what it does not do


@pytest.mark.parametrize("value", [0, -0.5, 1.5, "0.9", True, float("nan")])
def test_values(value):
    with pytest.raises(ValueError, match="evidence must be None or a number above 0 and up to 1"):
        StitchConfig(output="mixture", evidence=value)


def test_needs_output_gates():
    with pytest.raises(ValueError, match=r"evidence=0.9 is for output gates.*output is 'hub'"):
        StitchConfig(output="hub", evidence=0.9)


def test_refused(options, tmp_path):
    model, _, _ = pair(options=options)
    embeds = torch.zeros(2, 3, 32)
    refuses(model, "inputs_embeds do not say which tokens", lambda: model(inputs_embeds=embeds))
    prompt = {"input_ids": IDS, "max_new_tokens": 3}
    refuses(model, "Experts cannot be left out where", lambda: model.generate(**prompt, max_active_experts=1))
    kinds = [{"draft": "hub"}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": pristine("llama")}]
    for drafts in [*kinds, {"assistant_early_exit": 2}]:
        refuses(model, "Drafts have to be taken back", lambda drafts=drafts: model.generate(**prompt, **drafts))
    helped = pristine("llama")
    refuses(model, "cannot draft for another", lambda: helped.generate(IDS[:1], assistant_model=model))
    refuses(model, "cannot be exported", lambda: model.export(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def add_adapter(model, name, **options):
    """Make another adapter with the same experts, and switch to it."""
    model.add_adapter(name, StitchConfig(**options))
    model.set_adapter(name)
    for expert in "ab":
        model.attach_expert(expert, model.base_model.experts["default"][expert].model)


def test_caches_without_evidence(options):
    """What another adapter has filled tells nothing, and of a cropped cache nothing is known of the next token."""
    model, _, _ = pair(options=options)
    add_adapter(model, "plain", num_stitches=0, output="mixture")
    cache = DynamicCache(config=model.config)
    steps(model, cache, [4])
    model.set_adapter("default")
    with nothing_computed(model), pytest.raises(ValueError, match="the cache does not hold that"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    steps(model, cache, [4])
    model.set_adapter("plain")
    with torch.no_grad():
        model(input_ids=IDS[:, 4:6], past_key_values=cache)
    model.set_adapter("default")
    with nothing_computed(model), pytest.raises(ValueError, match="the cache does not hold that"):
        model(input_ids=IDS[:, 6:], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    steps(model, cache, [4])
    cache.crop(-2)
    with nothing_computed(model), pytest.raises(ValueError, match="the cache does not hold that"):
        model(input_ids=IDS[:, 2:], past_key_values=cache)


def test_another_forgetting_factor(options):
    model, _, _ = pair(options=options)
    add_adapter(model, "other", **options | {"evidence": 1.0})
    cache = DynamicCache(config=model.config)
    steps(model, cache, [4])
    model.set_adapter("default")
    with nothing_computed(model), pytest.raises(ValueError, match="with another forgetting factor"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)
    model.set_adapter("other")
    expected = logits(model)
    with torch.no_grad():
        assert_near(model(input_ids=IDS[:, 4:], past_key_values=cache).logits, expected[:, 4:], 2e-4)


def test_experts_come_and_go(options):
    """One weight serves all models: a new expert is judged by it from its first token."""
    model, hub, experts = pair(options=options)
    model.attach_expert("c", fresh("llama", seed=3))
    plain = {**experts, "c": pristine("llama", seed=3)}
    assert_near(logits(model), expected_logits(model, hub, plain), 2e-4)
    model.detach_expert("a")
    del plain["a"]
    assert_near(logits(model), expected_logits(model, hub, plain), 2e-4)
