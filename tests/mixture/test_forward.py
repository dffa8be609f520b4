"""`output="mixture"`: logits are log probabilities that the reference makes of the plain models' own logits."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from peft_bts.forward import mixed_head
from tests.helpers.bad_input import TOKENS, save
from tests.helpers.generation import nothing_computed
from tests.helpers.models import (
    FAMILIES,
    IDS,
    LEFT,
    MASKS,
    adapter_file,
    assert_near,
    both,
    expected_logits,
    fresh,
    logits,
    pristine,
    stitch,
)
from tests.helpers.reference import reference_forward
from tests.helpers.zoo import ARCHITECTURES, NO_FLOAT64_PADDING


FLOAT64, FLOAT32 = 1e-5, 2e-4  # of the largest log probability; norms pass through float32 even in float64
ALONE = {"num_stitches": 0}
STITCHED = {"num_stitches": 2}


def check(hub, experts, *, tolerance=FLOAT64, input_ids=IDS, call=None, dtype=torch.float64, **options):
    """Mix zoo models, given as (arch, options), and compare with the reference."""
    hub, plain_hub = both(hub[0], dtype=dtype, **hub[1])
    pairs = {name: both(arch, dtype=dtype, **kwargs) for name, (arch, kwargs) in experts.items()}
    model = stitch(hub, {name: pair[0] for name, pair in pairs.items()}, output="mixture", **options)
    actual = logits(model, input_ids, **(call or {}))
    expected = expected_logits(
        model, plain_hub, {name: pair[1] for name, pair in pairs.items()}, input_ids, **(call or {})
    )
    assert actual.dtype == dtype
    assert_near(actual, expected, tolerance)
    torch.testing.assert_close(actual.exp().sum(-1), torch.ones_like(actual[..., 0]))
    return model


def precision(archs, mask):
    float32 = mask is not None and any(name in NO_FLOAT64_PADDING for name in archs)
    return {"dtype": torch.float32, "tolerance": FLOAT32} if float32 else {"dtype": torch.float64}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch, mask):
    """Every architecture as hub and as expert, with what it does to logits, of unequal depths and widths."""
    experts = {"a": (arch, {"seed": 1}), "b": (arch, {"seed": 2, "layers": 6, "width": 48})}
    mask = MASKS[mask]
    for options in (ALONE, STITCHED):
        check((arch, {}), experts, call={"attention_mask": mask}, **options, **precision([arch], mask))


@pytest.mark.parametrize("i", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_mixed_architectures(i):
    """Experts of two other architectures: each head does to its own logits what its model does."""
    hub, one, two = (ARCHITECTURES[(i + shift) % len(ARCHITECTURES)] for shift in (0, 7, 25))
    experts = {"a": (one, {"seed": 1, "layers": 3}), "b": (two, {"seed": 2, "width": 48})}
    options = STITCHED if i % 2 else ALONE
    check((hub, {}), experts, call={"attention_mask": LEFT}, **options, **precision([hub, one, two], LEFT))


STRONG = {  # so strong that nothing would be left of the test's agreement without it
    "gemma2": {"final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.2},
    "granite": {"logits_scaling": 6.0},
}


@pytest.mark.parametrize("arch", STRONG)
@pytest.mark.parametrize("as_hub", [True, False])
def test_what_heads_do_to_logits(as_hub, arch):
    """Soft caps and scales hold for the model that has them, and for no other."""
    special, plain = (arch, STRONG[arch]), ("llama", {"seed": 1})
    hub, expert = (special, plain) if as_hub else (plain, special)
    with_it = check(hub, {"a": expert}, **ALONE)
    neutral = {name: None if "capping" in name else 1.0 for name in STRONG[arch]}
    hub, expert = ((arch, neutral), plain) if as_hub else (plain, (arch, neutral))
    without = check(hub, {"a": expert}, **ALONE)
    assert (logits(with_it) - logits(without)).abs().max() > 0.5


SMALL = {"a": ("llama", {"seed": 1, "layers": 5}), "b": ("llama", {"seed": 2, "layers": 4})}


@pytest.mark.parametrize("expert_streams", ["intact", "projected"])
@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
@pytest.mark.parametrize("num_stitches", [0, 1, 2, 3, 5])
def test_schedule(num_stitches, pattern, expert_streams):
    """No stitch, one, some, one per layer. With projected streams, experts' heads read their last projections."""
    options = {"num_stitches": num_stitches, "pattern": pattern, "expert_streams": expert_streams}
    check(("llama", {"layers": 5}), SMALL, **options)


@pytest.mark.parametrize("options", [{"gate": "token", "r": 3}, {"gate_bias": False}, {"layers_to_stitch": [0, 3]}])
def test_stitch_options(options):
    check(("llama", {}), SMALL, **options)


@pytest.mark.parametrize(("layers", "width"), [(1, 16), (2, 48), (7, 64)])
@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
def test_expert_of_another_size(options, layers, width):
    """No width is forced on an expert: its own head reads its own states."""
    check(("llama", {}), {"a": ("llama", {"seed": 1, "layers": layers, "width": width})}, **options)


@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
@pytest.mark.parametrize("sizes", [(64, 80), (64, 64, 72), (64, 50), (80, 64), (64, 80, 56)], ids=str)
def test_padded_vocabularies(sizes, options, tmp_path):
    """What an expert has beyond the hub's vocabulary is left out, and what it lacks has no probability in it."""
    folders = [save(tmp_path / str(i), TOKENS[:48], vocab=size, seed=i) for i, size in enumerate(sizes)]
    hub, *experts = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    plain = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in zip("hab", folders)}
    model = stitch(hub, dict(zip("ab", experts)), output="mixture", **options)
    ids = IDS % 45 + 3  # every model knows them
    actual = logits(model, ids)
    assert actual.shape[-1] == sizes[0]
    assert_near(actual, expected_logits(model, plain.pop("h"), plain, ids), FLOAT32)
    torch.testing.assert_close(actual.exp().sum(-1), torch.ones_like(actual[..., 0]))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(actual[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_near(model(input_ids=ids, labels=ids).loss, loss, 1e-5)


@pytest.mark.parametrize("active", [["a"], ["b", "c"], ["c", "a", "b"]], ids="".join)
@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
def test_active_experts(active, options):
    """Experts that are left out have no word in the mixture; afterwards all are back."""
    seeds = {"a": 1, "b": 2, "c": 3}
    experts = {name: fresh("llama", seed=seed) for name, seed in seeds.items()}
    model = stitch(fresh("llama"), experts, output="mixture", **options)
    tensors, config = adapter_file(model)
    absent = seeds.keys() - set(active)
    tensors = {key: tensor for key, tensor in tensors.items() if absent.isdisjoint(key.split("."))}
    plain = {name: pristine("llama", seed=seeds[name]) for name in active}
    with torch.no_grad():
        expected = reference_forward(pristine("llama"), plain, tensors, config, IDS)
    before = logits(model)
    with model.set_active_experts(active):
        assert_near(logits(model), expected, FLOAT32)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 10])], ids=["last", "five", "some"])
def test_logits_to_keep(keep, arch):
    """Heads run at the positions that are asked for, and at no other."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)}, output="mixture", **STITCHED)
    everywhere = logits(model)
    tokens = []
    head = model.base_model.experts["default"]["a"].model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: tokens.append(output.shape[-2]))
    some = logits(model, logits_to_keep=keep)
    hook.remove()
    positions = slice(-keep, None) if isinstance(keep, int) else keep
    assert_near(some, everywhere[:, positions], 1e-5)
    assert sum(tokens) == some.shape[0] * some.shape[1]


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 64 * 5, 64 * 24])
def test_chunks(chunk, arch, monkeypatch):
    """However many tokens heads are given at a time, the result is the same."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)}, output="mixture", **STITCHED)
    expected = logits(model)
    monkeypatch.setattr(mixed_head, "_CHUNK", chunk)
    assert_near(logits(model), expected, 1e-5)


HALF = {torch.bfloat16: 0.1, torch.float16: 0.0125}


@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype, autocast, options):
    """Log probabilities are float32 at least, and gates of half-precision models are float32 unless told otherwise."""
    hub, plain_hub = both("llama", dtype=dtype)
    expert, plain_expert = both("gpt2", seed=1, dtype=dtype)
    model = stitch(hub, {"a": expert}, output="mixture", autocast_adapter_dtype=autocast, **options)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32 if autocast else dtype}
    actual = logits(model)
    assert actual.dtype == torch.float32
    assert_near(actual, expected_logits(model, plain_hub, {"a": plain_expert}), HALF[dtype])


def test_models_of_other_precisions():
    """A float32 expert beside a bfloat16 hub keeps its precision to the end."""
    hub, plain_hub = both("llama", dtype=torch.bfloat16)
    expert, plain_expert = both("llama", seed=1)
    model = stitch(hub, {"a": expert}, output="mixture", **STITCHED)
    assert_near(logits(model), expected_logits(model, plain_hub, {"a": plain_expert}), HALF[torch.bfloat16])


@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch != "mpt"])
def test_inputs_embeds(arch, options):
    embeds = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    experts = {"a": (arch, {"seed": 1}), "b": ("llama", {"seed": 2, "layers": 3})}
    check((arch, {}), experts, input_ids=None, call={"inputs_embeds": embeds}, **options)


@pytest.mark.parametrize("arch", FAMILIES)
def test_arguments_by_position_and_tuples(arch):
    """`model(ids, mask)` and `return_dict=False` are as for any causal LM."""
    model = stitch(fresh(arch), {"a": fresh("gpt2", seed=1)}, output="mixture", **STITCHED)
    hub = model.get_base_model()
    order = list(inspect.signature(type(hub).forward).parameters)[1:]
    call = {"input_ids": IDS, "attention_mask": LEFT}
    last = max(map(order.index, call))
    with torch.no_grad():
        out = model(**call, labels=IDS)
        assert torch.equal(hub(*[call.get(name) for name in order[: last + 1]]).logits, out.logits)
        as_tuple = model(**call, labels=IDS, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0] == out.loss and torch.equal(as_tuple[1], out.logits)


@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_hidden_states(arch, options):
    """Hidden states and attentions are the hub's, of its depth; recording them changes no logit."""
    eager = {"attn_implementation": "eager"}
    wanted = {"output_hidden_states": True, "output_attentions": True}
    hub, experts = fresh(arch, **eager), {"a": fresh(arch, seed=1, layers=6, **eager), "b": fresh("llama", seed=2)}
    with torch.no_grad():
        alone = hub(input_ids=IDS, **wanted)
        model = stitch(hub, experts, output="mixture", **options)
        out = model(input_ids=IDS, **wanted)
    assert torch.equal(out.logits, logits(model))
    assert [state.shape for state in out.hidden_states] == [state.shape for state in alone.hidden_states]
    if options is ALONE:
        assert all(torch.equal(state, other) for state, other in zip(out.hidden_states, alone.hidden_states))
    assert [a if a is None else a.shape for a in out.attentions] == [
        a if a is None else a.shape for a in alone.attentions
    ]


def test_one_model_as_two_experts():
    expert = fresh("llama", seed=1)
    model = stitch(fresh("llama"), {"a": expert, "b": expert}, output="mixture", **STITCHED)
    plain = {"a": pristine("llama", seed=1), "b": pristine("llama", seed=1)}
    assert_near(logits(model), expected_logits(model, pristine("llama"), plain), FLOAT32)


def test_untrained_gates_are_uniform():
    """At the start all models have the same say, whatever they say."""
    model = stitch(fresh("llama"), {"a": fresh("gpt2", seed=1)}, output="mixture", num_stitches=0)
    with torch.no_grad():
        for parameter in model.base_model.model.stitch_output.parameters():
            parameter.zero_()
        plain = [m(input_ids=IDS).logits.softmax(-1) for m in (pristine("llama"), pristine("gpt2", seed=1))]
    assert_near(logits(model), (sum(plain) / 2).log(), 1e-5)


@pytest.mark.parametrize("arch", FAMILIES)
def test_disabled_and_unloaded(arch):
    """Without the adapter, the hub is itself, bit for bit, and so are hub and experts when all is undone."""
    hub, plain = both(arch)
    expert, plain_expert = both("llama", seed=1)
    model = stitch(hub, {"a": expert}, output="mixture", **STITCHED)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(plain))
    assert model.detach_expert("a") is expert
    assert model.unload() is hub
    for left, right in [(hub, plain), (expert, plain_expert)]:
        assert str(left) == str(right) and not [m for m in left.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert torch.equal(logits(left), logits(right))
        assert left.state_dict().keys() == right.state_dict().keys() and "forward" not in vars(left)


@pytest.mark.parametrize("options", [ALONE, STITCHED], ids=["alone", "stitched"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_backbone_without_its_head(grad, options):
    """What computes the head's product itself would get the hub's distribution: refused before anything runs."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, output="mixture", **options)
    with nothing_computed(model), pytest.raises(ValueError, match="without its head"), torch.set_grad_enabled(grad):
        model.get_base_model().model(input_ids=IDS)
    with model.disable_adapter(), torch.no_grad():
        state = model.get_base_model().model(input_ids=IDS)[0]
    with torch.no_grad():
        assert torch.equal(state, pristine("llama").model(input_ids=IDS)[0])


def test_no_expert():
    model = stitch(fresh("llama"), {}, output="mixture", num_stitches=0)
    with nothing_computed(model), pytest.raises(ValueError, match="No expert is attached"):
        logits(model)


@pytest.mark.parametrize("num_stitches", [0, -1, 1.5])
def test_no_stitches_need_a_mixture(num_stitches):
    with pytest.raises(ValueError, match=r"num_stitches must be .* at least 1 \(0 goes with output='mixture'"):
        StitchConfig(num_stitches=num_stitches, output="hub")
    with pytest.raises(ValueError, match="output must be one of hub, mixture, got 'all'"):
        StitchConfig(output="all")
    assert num_stitches != 0 or StitchConfig(num_stitches=0, output="mixture").num_stitches == 0
