"""The stitched model computes the paper's equations: its logits are the reference's, which reads the adapter file.

If one of these fails, a model trained here means something else than its file, or than the paper, says.
"""

import inspect

import pytest
import torch

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
from tests.helpers.reference import decoder_layers, reference_forward
from tests.helpers.zoo import ARCHITECTURES, NO_FLOAT64_PADDING


FLOAT64, FLOAT32 = 1e-5, 2e-4  # of the largest logit; norms and rotations pass through float32 even in float64


def check(hub, experts, *, tolerance=FLOAT64, input_ids=IDS, call=None, dtype=torch.float64, **options):
    """Stitch zoo models, given as (arch, options), and compare with the reference."""
    hub, plain_hub = both(hub[0], dtype=dtype, **hub[1])
    pairs = {name: both(arch, dtype=dtype, **kwargs) for name, (arch, kwargs) in experts.items()}
    model = stitch(hub, {name: pair[0] for name, pair in pairs.items()}, **options)
    plain_experts = {name: pair[1] for name, pair in pairs.items()}
    actual = logits(model, input_ids, **(call or {}))
    expected = expected_logits(model, plain_hub, plain_experts, input_ids, **(call or {}))
    assert actual.dtype == dtype
    assert_near(actual, expected, tolerance)
    return model, expected


def precision(arch, mask):
    """dtype and tolerance with which padding stays finite on an architecture."""
    float32 = mask is not None and any(name in NO_FLOAT64_PADDING for name in arch)
    return {"dtype": torch.float32, "tolerance": FLOAT32} if float32 else {"dtype": torch.float64}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch, mask):
    """Any supported architecture as hub and as expert, one expert of another depth and width, padded or not."""
    experts = {"a": (arch, {"seed": 1}), "b": (arch, {"seed": 2, "layers": 6, "width": 48})}
    mask = MASKS[mask]
    check((arch, {}), experts, call={"attention_mask": mask}, **precision([arch], mask))


@pytest.mark.parametrize("i", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_mixed_architectures(i):
    """Experts of two other architectures: each architecture is hub once and expert twice."""
    hub, one, two = (ARCHITECTURES[(i + shift) % len(ARCHITECTURES)] for shift in (0, 7, 25))
    experts = {"a": (one, {"seed": 1, "layers": 3}), "b": (two, {"seed": 2, "width": 48})}
    check((hub, {}), experts, call={"attention_mask": LEFT}, **precision([hub, one, two], LEFT))


SMALL = {"a": ("llama", {"seed": 1, "layers": 5}), "b": ("llama", {"seed": 2, "layers": 4})}


@pytest.mark.parametrize("expert_streams", ["intact", "projected"])
@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
@pytest.mark.parametrize("num_stitches", range(1, 8))
def test_schedule(num_stitches, pattern, expert_streams):
    """Every K that a hub of 7 layers can have, also where K does not divide it."""
    options = {"num_stitches": num_stitches, "pattern": pattern, "expert_streams": expert_streams}
    check(("llama", {"layers": 7}), SMALL, **options)


@pytest.mark.parametrize("layers", [[4], [0, 4], [3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
def test_layers_to_stitch(layers, pattern):
    """A schedule by hand overrides num_stitches."""
    model, _ = check(("llama", {"layers": 5}), SMALL, layers_to_stitch=layers, pattern=pattern, num_stitches=2)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted({int(name.split(".layers.")[1].split(".")[0]) for name in trainable}) == layers


@pytest.mark.parametrize("expert_streams", ["intact", "projected"])
@pytest.mark.parametrize("r", [None, 1, 5, 40])
@pytest.mark.parametrize("gate_bias", [True, False])
@pytest.mark.parametrize("gate", ["channel", "token"])
def test_stitch_options(gate, gate_bias, r, expert_streams):
    """Each form of gate and projection, ranks above the width among them."""
    options = {"gate": gate, "gate_bias": gate_bias, "r": r, "expert_streams": expert_streams}
    check(("llama", {}), SMALL, num_stitches=4, **options)


@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize(("layers", "width"), [(1, 16), (2, 48), (3, 32), (4, 64), (6, 16), (7, 48), (10, 32)])
def test_expert_of_another_size(layers, width, gate, r):
    """Shallower, deeper, narrower, wider: the expert is met at the same share of its depth, in its own width."""
    experts = {"a": ("llama", {"seed": 1, "layers": layers, "width": width})}
    check(("llama", {}), experts, num_stitches=4, gate=gate, r=r)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_number_of_experts(num_experts):
    """The sums run over all experts, whatever the order in which they came."""
    names = ["e3", "Z", "a_1", "0", "code"][:num_experts]
    check(("llama", {}), {name: ("llama", {"seed": seed}) for seed, name in enumerate(names, 1)})


def test_expert_is_the_hub_of_two():
    """Two models without a seed (the paper's table 8): one of the two plays the hub."""
    check(("qwen3", {"seed": 1}), {"b": ("qwen3", {"seed": 2})})


@pytest.mark.parametrize("active", [["a"], ["b", "c"], ["c", "a", "b"]], ids="".join)
@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
def test_active_experts(active, pattern):
    """`set_active_experts` is the model that never had the others; afterwards all are back."""
    seeds = {"a": 1, "b": 2, "c": 3}
    model = stitch(fresh("llama"), {name: fresh("llama", seed=seed) for name, seed in seeds.items()}, pattern=pattern)
    tensors, config = adapter_file(model)
    absent = seeds.keys() - set(active)
    tensors = {key: tensor for key, tensor in tensors.items() if absent.isdisjoint(key.split("."))}
    plain = {name: pristine("llama", seed=seeds[name]) for name in active}
    with torch.no_grad():
        expected = reference_forward(pristine("llama"), plain, tensors, config, IDS)
    before = logits(model)
    with model.set_active_experts(active):
        assert_near(logits(model), expected, FLOAT32)
        with model.set_active_experts(["b"]):
            logits(model)
        assert_near(logits(model), expected, FLOAT32)
        assert adapter_file(model)[0].keys() > tensors.keys() or not absent
    assert torch.equal(logits(model), before)
    model.set_active_experts(active)
    assert_near(logits(model), expected, FLOAT32)
    model.set_active_experts()
    assert torch.equal(logits(model), before)


def test_experts_from_the_config(tmp_path):
    """Experts named in the config are the same experts as those attached by hand."""
    for name, seed in [("a", 1), ("b", 2)]:
        pristine("llama", seed=seed).save_pretrained(tmp_path / name)
    model = stitch(fresh("llama"), {}, experts={name: str(tmp_path / name) for name in "ab"})
    plain = {"a": pristine("llama", seed=1), "b": pristine("llama", seed=2)}
    assert_near(logits(model), expected_logits(model, pristine("llama"), plain), FLOAT32)


def test_one_model_as_two_experts():
    """The same loaded model may serve under two names, each with a stream of its own."""
    expert = fresh("llama", seed=1)
    model = stitch(fresh("llama"), {"a": expert, "b": expert})
    plain = {"a": pristine("llama", seed=1), "b": pristine("llama", seed=1)}
    assert_near(logits(model), expected_logits(model, pristine("llama"), plain), FLOAT32)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "mpt"])  # PEFT refuses MPT's
def test_inputs_embeds(arch):
    """Soft prompts: without input_ids every expert gets the hub's embeddings."""
    embeds = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    experts = {"a": (arch, {"seed": 1}), "b": ("llama", {"seed": 2, "layers": 3})}
    check((arch, {}), experts, input_ids=None, call={"inputs_embeds": embeds})


@pytest.mark.parametrize("arch", FAMILIES)
def test_arguments_by_position(arch):
    """`model(ids, mask)` reaches the experts like `model(input_ids=ids, attention_mask=mask)`."""
    model = stitch(fresh(arch), {"a": fresh("gpt2", seed=1)})
    expected = logits(model, attention_mask=LEFT)
    hub = model.get_base_model()
    order = list(inspect.signature(type(hub).forward).parameters)[1:]  # gpt2's second one is the cache
    call = {"input_ids": IDS, "attention_mask": LEFT}
    last = max(map(order.index, call))
    with torch.no_grad():
        assert torch.equal(model(IDS, LEFT).logits, expected)
        assert torch.equal(hub(*[call.get(name) for name in order[: last + 1]]).logits, expected)


def test_position_ids():
    """Positions that a caller chooses (prefixes, padding of its own) are the experts' positions too."""
    positions = torch.stack([torch.arange(3, 15), torch.arange(40, 52)])
    mask = torch.ones_like(IDS)
    model, _ = check(("gpt2", {}), {"a": ("gpt2", {"seed": 1})}, call={"position_ids": positions})
    assert (logits(model, position_ids=positions) - logits(model, attention_mask=mask)).abs().max() > 0.1


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])
def test_padding_free(arch):
    """Documents in one row, told apart by their positions, do not see each other in any model."""
    positions = torch.tensor([[*range(5), *range(7)]])
    call = {"position_ids": positions, "use_cache": False}
    experts = {"a": (arch, {"seed": 1}), "b": ("llama", {"seed": 2, "layers": 6})}
    model, expected = check((arch, {}), experts, input_ids=IDS[:1], call=call)
    second = logits(model, IDS[:1, 5:], use_cache=False)
    assert_near(expected[:, 5:], second, FLOAT64)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_packed_mask(arch):
    """A hand-made 4D mask, as for two documents in one row, holds for the experts too, or is refused."""
    document = torch.tensor([0] * 5 + [1] * 7)
    allowed = (document[:, None] == document) & torch.ones(12, 12).tril().bool()
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model = stitch(fresh("llama"), {"a": fresh(arch, seed=1)})
    expected = expected_logits(model, pristine("llama"), {"a": pristine(arch, seed=1)}, attention_mask=mask)
    try:
        actual = logits(model, attention_mask=mask)
    except ValueError as error:
        assert arch != "llama" and "mask" in str(error) and "'a'" in str(error)
    else:
        assert_near(actual, expected, FLOAT32)


def test_loss():
    """`labels` give the loss of the stitched logits: what Trainer minimises."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)})
    expected = expected_logits(model, pristine("llama"), {"a": pristine("llama", seed=1)})
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    with torch.no_grad():
        assert_near(model(input_ids=IDS, labels=IDS).loss, loss, 1e-5)


HALF = {torch.bfloat16: 0.1, torch.float16: 0.0125}  # 25 roundings: of the models' layers, and of half stitches


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(arch, autocast, dtype):
    """Half-precision models get float32 stitches, or stitches of their own precision if PEFT is told so."""
    experts = {"a": (arch, {"seed": 1}), "b": ("llama", {"seed": 2, "layers": 6, "width": 48})}
    options = {"dtype": dtype, "tolerance": HALF[dtype], "autocast_adapter_dtype": autocast}
    model, _ = check((arch, {}), experts, **options)
    weights = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert weights == {torch.float32 if autocast else dtype}


@pytest.mark.parametrize("autocast", [True, False])
def test_experts_of_other_precisions(autocast):
    """A float32 expert and a bfloat16 one beside a bfloat16 hub: every stream keeps its own precision."""
    precisions = {"a": torch.float32, "b": torch.bfloat16}
    experts = {name: both("llama", seed=seed, dtype=precisions[name]) for seed, name in enumerate("ab", 1)}
    hub, plain_hub = both("llama", dtype=torch.bfloat16)
    model = stitch(hub, {name: pair[0] for name, pair in experts.items()}, autocast_adapter_dtype=autocast)
    expected = expected_logits(model, plain_hub, {name: pair[1] for name, pair in experts.items()})
    assert_near(logits(model), expected, HALF[torch.bfloat16])


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_hidden_states(arch, asked_before):
    """Hidden states and attentions are the hub's, of its depth: an expert never adds its own."""
    eager = {"attn_implementation": "eager"}
    wanted = {"output_hidden_states": True, "output_attentions": True}
    hub, experts = fresh(arch, **eager), {"a": fresh(arch, seed=1, layers=6, **eager), "b": fresh("llama", seed=2)}
    with torch.no_grad():
        alone = hub(input_ids=IDS, **wanted)
        if asked_before:
            for expert in experts.values():
                expert(input_ids=IDS, **wanted)
        model = stitch(hub, experts)
        out = model(input_ids=IDS, **wanted)
    assert torch.equal(out.logits, logits(model))
    assert [state.shape for state in out.hidden_states] == [state.shape for state in alone.hidden_states]
    assert [a if a is None else a.shape for a in out.attentions] == [
        a if a is None else a.shape for a in alone.attentions
    ]


@pytest.mark.parametrize("arch", FAMILIES)
def test_hidden_states_are_the_stitched_ones(arch):
    """hidden_states[i] is what layer i gets, as in every model of transformers: probes see what the hub sees."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)}, pattern="experts_into_hub")
    received = []
    _, layers = decoder_layers(model.get_base_model())
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(hooks) + 1 == len(received) + 1
    assert all(torch.equal(state, seen) for state, seen in zip(states, received))


def test_dropping_out_and_in():
    """Disabled, the hub is itself, bit for bit; enabled again, the stitches are back."""
    hub, plain = both("gpt_neo")
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(plain))


@pytest.mark.parametrize("arch", FAMILIES)
def test_untouched_models(arch):
    """Stitching changes no weight of hub or expert, and detaching and unloading give both back as they came."""
    hub, plain_hub = both(arch)
    expert, plain_expert = both("llama", seed=1)
    expert.train()
    expert.lm_head.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in expert.named_parameters()}
    model = stitch(hub, {"a": expert})
    logits(model)
    assert not any(p.requires_grad for p in expert.parameters()) and not expert.training
    assert model.detach_expert("a") is expert
    assert expert.training and {name: p.requires_grad for name, p in expert.named_parameters()} == flags
    assert model.unload() is hub
    for left, right in [(hub, plain_hub), (expert.eval(), plain_expert)]:
        assert str(left) == str(right) and not [m for m in left.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert torch.equal(logits(left), logits(right))
        state, before = left.state_dict(), right.state_dict()
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
