"""The two equations of the paper alone, as modules: what they compute, how they start, how models come and go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_bts import ExpertsIntoHub, HubIntoExperts, StitchConfig
from tests.helpers.reference import experts_into_hub, hub_into_experts


KINDS = [ExpertsIntoHub, HubIntoExperts]
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}
settings.register_profile("stitches", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("stitches")

options = st.fixed_dictionaries(
    {
        "gate": st.sampled_from(["channel", "token"]),
        "gate_bias": st.booleans(),
        "r": st.sampled_from([None, 1, 3, 50]),
        "dtype": st.sampled_from(list(EPSILON)),
    }
)
names = st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True).filter(lambda name: name != "hub")
widths = st.dictionaries(names, st.integers(1, 40), min_size=1, max_size=6)
batches = st.lists(st.integers(0, 3), min_size=0, max_size=3)
streams = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def random_stitch(kind, d_hub, d_experts, scale=1.0, **options):
    """Projections around the identity; gate logits of about `scale`."""
    stitch = kind(d_hub, d_experts, **options)
    with torch.no_grad():
        for name, parameter in stitch.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64) / parameter.shape[-1] ** 0.5
            parameter.add_((noise * (scale if name.startswith("gate.") else 1.0)).to(parameter.dtype))
    return stitch


def random_states(d_hub, d_experts, batch=(2, 3), dtype=torch.float32):
    return torch.randn(*batch, d_hub, dtype=dtype), {
        name: torch.randn(*batch, width, dtype=dtype) for name, width in d_experts.items()
    }


def weights(stitch, d_hub, d_experts):
    """Gates {model: (weight, bias)} and dense projections {expert: matrix} of a stitch, in float64."""

    def double(tensor):
        return None if tensor is None else tensor.detach().double()

    into_hub = isinstance(stitch, ExpertsIntoHub)
    gates = {name: stitch.gate.of(name) for name in [*d_experts, *(["hub"] if into_hub else [])]}
    projections = {}
    for name, d_expert in d_experts.items():
        projection = stitch.proj.of(name)
        if stitch.r is None:
            projections[name] = double(projection.weight)
        else:
            eye = torch.eye(*((d_hub, d_expert) if into_hub else (d_expert, d_hub)), dtype=torch.float64)
            projections[name] = eye + double(projection.up.weight) @ double(projection.down.weight)
    return {name: (double(gate.weight), double(gate.bias)) for name, gate in gates.items()}, projections


def literally(stitch, hub, states):
    """The paper's equation, in float64, from what the weights' precision makes of the states."""
    dtype = next(stitch.parameters()).dtype
    d_experts = {name: state.shape[-1] for name, state in states.items()}
    gate, proj = weights(stitch, hub.shape[-1], d_experts)
    equation = experts_into_hub if isinstance(stitch, ExpertsIntoHub) else hub_into_experts
    return equation(hub.to(dtype).double(), {n: s.to(dtype).double() for n, s in states.items()}, gate, proj)


@given(widths=widths, d_hub=st.integers(1, 40), batch=batches, options=options, stream=streams, seed=st.integers(0, 9))
def test_experts_into_hub(widths, d_hub, batch, options, stream, seed):
    """Equation 3, for any shapes: what the hub reads of its experts."""
    torch.manual_seed(seed)
    stitch = random_stitch(ExpertsIntoHub, d_hub, widths, **options)
    hub, states = random_states(d_hub, widths, batch, stream)
    new_hub, projected = stitch(hub, states)
    expected_hub, expected = literally(stitch, hub, states)
    assert projected.keys() == widths.keys()
    for actual, wanted in [(new_hub, expected_hub), *((projected[name], expected[name]) for name in widths)]:
        assert actual.dtype == stream and actual.shape == (*batch, d_hub)
        near(actual, wanted, options["dtype"], stream)


@given(widths=widths, d_hub=st.integers(1, 40), batch=batches, options=options, stream=streams, seed=st.integers(0, 9))
def test_hub_into_experts(widths, d_hub, batch, options, stream, seed):
    """Equation 4, for any shapes: what the experts read of the hub."""
    torch.manual_seed(seed)
    stitch = random_stitch(HubIntoExperts, d_hub, widths, **options)
    hub, states = random_states(d_hub, widths, batch, stream)
    new, expected = stitch(hub, states), literally(stitch, hub, states)
    assert new.keys() == widths.keys()
    for name, state in states.items():
        assert new[name].dtype == stream and new[name].shape == state.shape
        near(new[name], expected[name], options["dtype"], stream)


def near(actual, expected, *dtypes):
    """Equal to the precision of the least precise dtype, relative to the largest value, or to 1 where all are tiny."""
    if actual.numel():
        error = (actual.double() - expected).abs().max() / (1 + expected.abs().max())
        assert error <= max(EPSILON[dtype] for dtype in dtypes)


@pytest.mark.parametrize("gate", ["channel", "token"])
def test_large_logits(gate):
    """Saturated gates pick one model, and never turn into NaN."""
    torch.manual_seed(0)
    widths = {"a": 8, "b": 12}
    hub, states = random_states(8, widths)
    stitch = random_stitch(ExpertsIntoHub, 8, widths, scale=1e6, gate=gate)
    near(stitch(hub, states)[0], literally(stitch, hub, states)[0], torch.float32)
    stitch = random_stitch(HubIntoExperts, 8, widths, scale=1e6, gate=gate)
    new = stitch(hub, states)
    assert all(state.isfinite().all() for state in new.values())


@pytest.mark.parametrize("r", [None, 4])
@pytest.mark.parametrize("gate", ["channel", "token"])
def test_start(gate, r):
    """Stitches start as the plain average, of states cut or padded with zeros to the width of the reader."""
    torch.manual_seed(0)
    hub, states = random_states(8, {"same": 8, "wide": 12, "thin": 5}, dtype=torch.float64)
    widths = {name: state.shape[-1] for name, state in states.items()}
    options = {"gate": gate, "r": r, "dtype": torch.float64}

    def fit(state, width):
        return torch.nn.functional.pad(state, (0, width - state.shape[-1]))

    new_hub, projected = ExpertsIntoHub(8, widths, **options)(hub, states)
    assert all(torch.equal(projected[name], fit(states[name], 8)) for name in widths)
    torch.testing.assert_close(new_hub, (hub + sum(projected.values())) / 4)
    for name, state in HubIntoExperts(8, widths, **options)(hub, states).items():
        torch.testing.assert_close(state, (states[name] + fit(hub, widths[name])) / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [None, 4])
def test_random_start(kind, r):
    """`init_weights=False` leaves no weight at its usual start, so that tests with it test something."""
    stitch = kind(8, {"a": 8}, r=r, init_weights=False)
    assert all(parameter.abs().min() > 0 for parameter in stitch.parameters())
    if r is None:
        assert (stitch.proj.of("a").weight.diagonal() != 1).all()


@pytest.mark.parametrize("r", [None, 4])
@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns_at_once(kind, gate, r):
    """From the start, no weight is without gradient but the low-rank `down` (whose `up` starts at zero)."""
    torch.manual_seed(0)
    widths = {"a": 8, "b": 12}
    hub, states = random_states(8, widths)
    stitch = kind(8, widths, gate=gate, r=r)
    out = stitch(hub, states)
    loss = out[0].square().mean() if kind is ExpertsIntoHub else sum(s.square().mean() for s in out.values())
    loss.backward()
    silent = {name for name, parameter in stitch.named_parameters() if parameter.grad.abs().max() == 0}
    assert silent == {name for name, _ in stitch.named_parameters() if ".down." in name}


@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("init", ["zero", "hub", "closed"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_expert(kind, init, gate):
    """A new expert leaves the others' weights alone, and takes the share of the gates that its `init` says."""
    torch.manual_seed(0)
    widths = {"b": 8, "c": 12}
    stitch = random_stitch(kind, 8, widths, gate=gate, dtype=torch.float64)
    before = {key: tensor.clone() for key, tensor in stitch.state_dict().items()}
    stitch.add_expert("a", 10, init=init)
    after = stitch.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float64}
    assert stitch.experts == ["a", "b", "c"]

    hub, states = random_states(8, {**widths, "a": 10}, dtype=torch.float64)
    if kind is HubIntoExperts:
        torch.testing.assert_close(stitch(hub, states)["a"], (states["a"] + torch.nn.functional.pad(hub, (0, 2))) / 2)
        return
    logit = hub @ stitch.gate.of("hub").weight.T + stitch.gate.of("hub").bias
    others = torch.stack([hub @ gate.weight.T + gate.bias for gate in map(stitch.gate.of, ["hub", "b", "c"])])
    new = {"zero": torch.zeros_like(logit), "hub": logit - 2, "closed": torch.full_like(logit, -6)}[init]
    share = new.exp() / (new.exp() + others.exp().sum(0))
    old_hub, _ = stitch(hub, {name: states[name] for name in widths})
    expected = (1 - share) * old_hub + share * states["a"][..., :8]
    torch.testing.assert_close(stitch(hub, states)[0], expected)


@pytest.mark.parametrize("gate", ["channel", "token"])
def test_closed_expert_takes_less_than_one_percent(gate):
    """`init="closed"` keeps the old function to within 1%, from the plain start and after training."""
    torch.manual_seed(0)
    for scale in (0.0, 0.3):
        stitch = random_stitch(ExpertsIntoHub, 8, {"a": 8}, gate=gate, scale=scale)
        hub, states = random_states(8, {"a": 8, "b": 8})
        stitch.add_expert("b", 8, init="closed")
        share = {name: torch.zeros(2, 3, 8) for name in "ab"} | {"b": torch.ones(2, 3, 8)}
        stitch.proj.of("a").weight.data.zero_()
        assert stitch(torch.zeros_like(hub), share)[0].max() < 0.01
        old, _ = stitch(hub, {"a": states["a"]})
        assert (stitch(hub, states)[0] - old).abs().max() < 0.01 * max(s.abs().max() for s in (hub, states["b"])) * 2


@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
@torch.no_grad()
def test_closed_gates_shut_out_what_overflows(gate, overflow):
    """A gate of exactly 0 is no part at all, whatever stands behind it; any other gate hands it on."""
    stitch = random_stitch(ExpertsIntoHub, 8, {"a": 4, "b": 4}, gate=gate)
    hub, states = random_states(8, {"a": 4, "b": 4})
    stitch.gate.of("b").bias.fill_(-1000.0)
    expected, _ = stitch(hub, states)
    states["b"].fill_(overflow)
    assert torch.equal(stitch(hub, states)[0], expected)
    stitch.gate.of("b").bias.fill_(-6.0)
    assert not stitch(hub, states)[0].isfinite().any()


def test_inits_that_need_a_bias():
    """Without a bias a gate cannot be closed: said clearly, and nothing is added."""
    stitch = ExpertsIntoHub(8, {"a": 8}, gate_bias=False)
    for init in ("hub", "closed"):
        with pytest.raises(ValueError, match=rf"init='{init}'.*gate_bias=False.*'zero'"):
            stitch.add_expert("b", 8, init=init)
    with pytest.raises(ValueError, match="'zero', 'hub' or 'closed', got 'open'"):
        stitch.add_expert("b", 8, init="open")
    assert stitch.experts == ["a"]
    stitch.add_expert("b", 8)
    assert stitch.experts == ["a", "b"]


@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_removal_is_absence(kind, r):
    """A removed expert and one that was never there give the same: the softmax renormalises over the rest."""
    torch.manual_seed(0)
    widths = {"a": 8, "b": 12, "c": 6}
    stitch = random_stitch(kind, 8, widths, r=r)
    hub, states = random_states(8, widths)
    rest = {name: states[name] for name in "ac"}
    absent = stitch(hub, rest)
    stitch.remove_expert("b")
    assert stitch.experts == ["a", "c"] and not [key for key in stitch.state_dict() if "for_b" in key]
    removed, expected = stitch(hub, rest), literally(stitch, hub, rest)
    if kind is ExpertsIntoHub:
        absent, removed, expected = absent[0], removed[0], expected[0]
        assert torch.equal(removed, absent)
        near(removed, expected, torch.float32)
    else:
        for name in rest:
            assert torch.equal(removed[name], absent[name])
            near(removed[name], expected[name], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind):
    """Dropout falls on the gates' logits, in training only: a dropped logit is 0, the others are scaled up."""
    torch.manual_seed(0)
    rate, d = 0.4, 64
    stitch = random_stitch(kind, d, {"a": d}, gate_dropout=rate, dtype=torch.float64)
    with torch.no_grad():
        stitch.proj.of("a").weight.copy_(2 * torch.eye(d))
    hub, states = torch.ones(50, 4, d, dtype=torch.float64), {"a": torch.ones(50, 4, d, dtype=torch.float64)}

    def gate():  # h_0 = h_a = 1 and p = 2: the result is 1 + the expert's (or the hub's) share
        out = stitch(hub, states)
        return (out[0] if kind is ExpertsIntoHub else out["a"]) - 1

    stitch.eval()
    assert torch.equal(gate(), gate()) and torch.equal(gate()[0, 0], gate()[1, 1])

    stitch.train()
    logits = {name: (stitch.gate.of(name)(hub[0, 0])) for name in (["hub", "a"] if kind is ExpertsIntoHub else ["a"])}
    kept = {name: logit / (1 - rate) for name, logit in logits.items()}
    zero = torch.zeros_like(logits["a"])
    if kind is ExpertsIntoHub:
        outcomes = {
            (h, a): torch.sigmoid((kept["a"] if a else zero) - (kept["hub"] if h else zero))
            for h in (0, 1)
            for a in (0, 1)
        }
        chances = {(h, a): (1 - rate if h else rate) * (1 - rate if a else rate) for h, a in outcomes}
    else:
        outcomes, chances = {0: torch.sigmoid(zero), 1: torch.sigmoid(kept["a"])}, {0: rate, 1: 1 - rate}
    seen = gate()
    hits = {key: ((seen - outcome).abs() < 1e-9) for key, outcome in outcomes.items()}
    assert torch.stack(list(hits.values())).any(0).all()
    for key, chance in chances.items():
        assert hits[key].double().mean().item() == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("r", [None, 4])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, stream, r):
    """Under autocast, as Trainer(bf16=True) has it, forward and backward run and every stream keeps its dtype."""
    torch.manual_seed(0)
    widths = {"a": 8, "b": 12}
    stitch = random_stitch(kind, 8, widths, r=r)
    hub, states = random_states(8, widths, dtype=stream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stitch(hub, states)
    expected = literally(stitch, hub, states)
    if kind is ExpertsIntoHub:
        out, expected = {"hub": out[0], **out[1]}, {"hub": expected[0], **expected[1]}
    for name, state in out.items():
        assert state.dtype == stream
        near(state, expected[name], torch.bfloat16)
    sum(state.float().square().mean() for state in out.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in stitch.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_read_only(kind):
    """A stitch writes into none of its inputs: layers before it may need them for their gradients."""
    hub, states = random_states(8, {"a": 8, "b": 12})
    before = hub.clone(), {name: state.clone() for name, state in states.items()}
    random_stitch(kind, 8, {"a": 8, "b": 12})(hub, states)
    assert torch.equal(hub, before[0]) and all(torch.equal(states[name], before[1][name]) for name in states)


PAPER = 26 * 3072**2  # what the paper's 264M are without the hub gates that equation 4 never uses


def test_parameter_count_of_the_paper():
    """Four stitches of the paper's width and three experts have 245,366,784 weights."""
    options = {"gate_bias": False, "device": "meta"}
    stitches = [kind(3072, dict.fromkeys("abc", 3072), **options) for kind in KINDS * 2]
    assert sum(p.numel() for stitch in stitches for p in stitch.parameters()) == PAPER == 245_366_784


def test_parameter_count_of_the_papers_model():
    """A hub of the paper's depth and width trains those weights and no others (thin elsewhere, to fit the test)."""
    size = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 1}
    size |= {"vocab_size": 64, "intermediate_size": 64}
    with torch.device("meta"):
        hub = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=20, **size))
    total = sum(p.numel() for p in hub.parameters())
    model = get_peft_model(hub, StitchConfig(gate_bias=False, output="hub"), low_cpu_mem_usage=True)
    expert = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **size), dtype=torch.bfloat16)
    for name in "abc":
        model.attach_expert(name, expert)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == PAPER
    assert sorted({int(name.split(".layers.")[1].split(".")[0]) for name in trained}) == [4, 9, 14, 19]
    assert sum(p.numel() for p in model.parameters()) == total + PAPER + sum(p.numel() for p in expert.parameters())
