"""The reference must itself be right: each test has an answer that is known without any stitch maths."""

import copy
import threading
import time

import pytest
import torch

from tests.helpers import reference
from tests.helpers.reference import (
    decoder_layers,
    experts_into_hub,
    hub_into_experts,
    random_stitch_tensors,
    reference_forward,
    schedule,
)
from tests.helpers.zoo import ARCHITECTURES, NO_FLOAT64_PADDING, UNSUPPORTED, tiny_config, tiny_model


torch.set_num_threads(1)

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
RIGHT = torch.ones_like(IDS).masked_fill(torch.arange(12) >= torch.tensor([[12], [8]]), 0)
LEFT = RIGHT.flip(1)
WIDE_OPEN = 1e3  # a gate bias that leaves nothing to any other model
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "bamba"]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **kwargs).logits


def stitched(*args, **kwargs):
    with torch.no_grad():
        return reference_forward(*args, IDS, **kwargs)


def identity(tensors):
    """Projections at the identity, gates at zero."""
    return {key: torch.eye(*t.shape) if ".proj." in key else torch.zeros_like(t) for key, t in tensors.items()}


def open_gate(tensors, name, layer=""):
    """Adds so much to the gate of `name` (at one hub layer, or at all) that it takes everything."""
    keys = [key for key in tensors if key.endswith(f"gate.{name}.bias") and f".{layer}" in key]
    assert keys
    return {key: t + WIDE_OPEN if key in keys else t for key, t in tensors.items()}


def share_ends(model, hub):
    """Gives `model` the hub's embeddings, final norm and head: everything but its decoder layers."""
    path, _ = decoder_layers(model)
    state = {key: t for key, t in hub.state_dict().items() if not key.startswith(path)}
    model.load_state_dict(state, strict=False)
    return model


def chimera(hub, expert, hub_layers, expert_layers, **kwargs):
    """A model of these layers of the hub, then these of the expert, between the hub's own embeddings and head."""
    layers = [decoder_layers(hub)[1][i] for i in hub_layers] + [decoder_layers(expert)[1][i] for i in expert_layers]
    model = share_ends(tiny_model(layers=len(layers), **kwargs), hub)
    for target, source in zip(decoder_layers(model)[1], layers, strict=True):
        target.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_hub_alone_speaks_when_its_gates_are_open(arch, mask):
    hub, expert = tiny_model(arch), tiny_model(arch, seed=1)
    config = {"num_stitches": 4}
    tensors = open_gate(random_stitch_tensors(hub, {"a": expert}, config), "hub")
    assert torch.equal(
        stitched(hub, {"a": expert}, tensors, config, attention_mask=mask), logits(hub, attention_mask=mask)
    )


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_expert_alone_speaks_when_the_only_gate_is_open_to_it(arch, mask):
    hub = tiny_model(arch)
    experts = {"a": tiny_model(arch, seed=1), "b": share_ends(tiny_model(arch, seed=2), hub)}
    config = {"num_stitches": 1}
    tensors = open_gate(identity(random_stitch_tensors(hub, experts, config)), "b")
    actual = stitched(hub, experts, tensors, config, attention_mask=mask)
    assert torch.equal(actual, logits(experts["b"], attention_mask=mask))


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_stream_that_changes_over_runs_through_the_layers_of_both(arch):
    """Hub-into-Experts open after 2 of 4 layers, the last stitch open to the expert: half hub, half expert."""
    hub, expert = tiny_model(arch), tiny_model(arch, seed=1)
    config = {"num_stitches": 2}
    tensors = open_gate(identity(random_stitch_tensors(hub, {"a": expert}, config)), "a")
    expected = logits(chimera(hub, expert, [0, 1], [2, 3], arch=arch))
    assert torch.equal(stitched(hub, {"a": expert}, tensors, config), expected)


# A 4-layer hub's stitch after layer 2 meets an expert of depth d after round(d / 2) of its layers, halves to even.
@pytest.mark.parametrize(("depth", "boundary"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
def test_an_expert_of_another_depth_is_met_at_its_own_layer(depth, boundary):
    hub, expert = tiny_model("llama"), tiny_model("llama", layers=depth, seed=1)
    config = {"num_stitches": 2}
    tensors = open_gate(identity(random_stitch_tensors(hub, {"a": expert}, config)), "a")
    expected = logits(chimera(hub, expert, [0, 1], range(boundary, depth), arch="llama"))
    assert torch.equal(stitched(hub, {"a": expert}, tensors, config), expected)


def test_stitches_on_one_expert_boundary_apply_in_order():
    """One expert layer, four stitches: after hub layers 1 and 2 at its layer 0, after 3 and 4 behind its layer."""
    hub, expert = tiny_model("llama"), tiny_model("llama", layers=1, seed=1)
    config = {"num_stitches": 4}  # into expert (0), into hub (0), into expert (1), into hub (1)
    tensors = identity(random_stitch_tensors(hub, {"a": expert}, config))
    tensors = open_gate(open_gate(tensors, "a", "layers.0."), "a", "layers.1.")  # layer 1 -> expert -> back: no change
    tensors = open_gate(tensors, "hub", "layers.3.")
    key = "base_model.model.model.layers.{}.stitch_layer.proj.a.weight".format
    tensors[key(0)], tensors[key(1)] = 2 * torch.eye(32), 0.5 * torch.eye(32)

    expected = logits(chimera(hub, hub, [0, 2, 3], [], arch="llama", seed=1))  # the hub without layer 1
    assert torch.equal(stitched(hub, {"a": expert}, tensors, config), expected)


def test_projected_streams_go_on_as_the_experts_own():
    hub, expert = tiny_model("llama"), share_ends(tiny_model("llama", seed=1), tiny_model("llama"))
    config = {"num_stitches": 2, "pattern": "experts_into_hub"}
    tensors = random_stitch_tensors(hub, {"a": expert}, config)
    last = {key: t for key, t in open_gate(identity(tensors), "a").items() if "layers.3." in key}
    tensors = tensors | last
    projection = tensors["base_model.model.model.layers.1.stitch_layer.proj.a.weight"]

    intact = stitched(hub, {"a": expert}, tensors, config)
    assert torch.equal(intact, logits(expert))

    projected = stitched(hub, {"a": expert}, tensors, config | {"expert_streams": "projected"})
    expert.model.layers[1].register_forward_hook(lambda layer, args, output: output @ projection.T)
    torch.testing.assert_close(projected, logits(expert), rtol=1e-4, atol=1e-4)


def test_uniform_gates_average_the_models():
    hub = tiny_model("llama")
    experts = {"a": tiny_model("llama", seed=1, layers=6), "b": tiny_model("llama", seed=2)}
    config = {"num_stitches": 1}
    tensors = identity(random_stitch_tensors(hub, experts, config))
    states = []
    for model in [hub, *experts.values()]:
        hook = decoder_layers(model)[1][-1].register_forward_hook(lambda layer, args, output: states.append(output))
        logits(model)
        hook.remove()
    with torch.no_grad():
        expected = hub.lm_head(hub.model.norm(sum(states) / 3))
    torch.testing.assert_close(stitched(hub, experts, tensors, config), expected, rtol=1e-4, atol=1e-4)


def test_a_token_gate_is_a_channel_gate_with_equal_rows():
    hub, expert = tiny_model("llama"), tiny_model("llama", seed=1, width=48)
    config = {"num_stitches": 4, "gate": "token"}
    token = random_stitch_tensors(hub, {"a": expert}, config)
    channel = {}
    for key, t in token.items():
        rows = 48 if ".gate.a." in key and int(key.split(".")[4]) % 2 == 0 else 32
        channel[key] = t.expand(rows, *t.shape[1:]) if ".gate." in key else t
    torch.testing.assert_close(
        stitched(hub, {"a": expert}, token, config),
        stitched(hub, {"a": expert}, channel, {"num_stitches": 4}),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_low_rank_projection_is_its_product_beside_the_identity():
    hub, expert = tiny_model("llama"), tiny_model("llama", seed=1, width=48)
    config = {"num_stitches": 4, "r": 3, "gate_bias": False}
    tensors = random_stitch_tensors(hub, {"a": expert}, config)
    dense = {}
    for key, t in tensors.items():
        if key.endswith(".down.weight"):
            product = tensors[key.replace(".down.", ".up.")] @ t
            dense[key.replace(".down.", ".")] = product + torch.eye(*product.shape)
        elif ".gate." in key:
            dense[key] = t
    assert torch.equal(
        stitched(hub, {"a": expert}, tensors, config), stitched(hub, {"a": expert}, dense, config | {"r": None})
    )


def test_schedules():
    """(hub layer index, Experts-into-Hub): the paper's examples for 20 layers."""
    assert schedule({"num_stitches": 4}, 20) == [(4, False), (9, True), (14, False), (19, True)]
    assert schedule({"num_stitches": 3}, 20) == [(5, True), (11, False), (19, True)]
    assert schedule({"num_stitches": 1}, 20) == [(19, True)]
    assert schedule({"num_stitches": 3}, 3) == [(0, True), (1, False), (2, True)]
    assert schedule({"layers_to_stitch": [0, 19], "num_stitches": 7}, 20) == [(0, False), (19, True)]
    assert schedule({"num_stitches": 2, "pattern": "experts_into_hub"}, 4) == [(1, True), (3, True)]


def test_the_equations_by_hand():
    """One channel, one expert: numbers small enough to do on paper."""
    h_hub, h = torch.tensor([[2.0]]).double(), {"a": torch.tensor([[5.0]]).double()}
    three = torch.tensor([3.0]).double().log()  # softmax of (log 3, 0) is (3/4, 1/4), sigmoid of log 3 is 3/4
    zero, two = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()
    new_hub, p = experts_into_hub(h_hub, h, {"hub": (zero, three), "a": (zero, None)}, {"a": two})
    torch.testing.assert_close(new_hub.item(), 0.75 * 2 + 0.25 * 10)
    assert p["a"].item() == 10
    new = hub_into_experts(h_hub, h, {"a": (zero, three)}, {"a": two})
    torch.testing.assert_close(new["a"].item(), 0.25 * 5 + 0.75 * 4)


def test_gradients_agree_with_finite_differences():
    hub = tiny_model("gpt_neox", dtype=torch.float64)  # float64 throughout: its norm does not go through float32
    experts = {name: tiny_model("gpt_neox", dtype=torch.float64, seed=seed) for name, seed in [("a", 1), ("b", 2)]}
    config = {"num_stitches": 3, "r": 2}
    tensors = random_stitch_tensors(hub, experts, config, dtype=torch.float64)
    leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
    reference_forward(hub, experts, leaves, config, IDS).square().mean().backward()

    generator = torch.Generator().manual_seed(0)
    for key, t in tensors.items():
        direction = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        up, down = (
            stitched(hub, experts, tensors | {key: t + eps * direction}, config).square().mean()
            for eps in (1e-5, -1e-5)
        )
        expected = (up - down) / 2e-5
        torch.testing.assert_close((leaves[key].grad * direction).sum(), expected, rtol=1e-5, atol=1e-7)
        assert expected.abs() > 1e-6, f"nothing depends on {key}"


def test_one_module_may_be_hub_and_expert_at_once():
    hub = tiny_model("llama")
    config = {"num_stitches": 4}
    tensors = random_stitch_tensors(hub, {"a": hub}, config)
    expected = stitched(hub, {"a": copy.deepcopy(hub)}, tensors, config)
    assert torch.equal(stitched(hub, {"a": hub}, tensors, config), expected)


def test_the_file_is_read_to_the_last_tensor():
    hub, experts = tiny_model("llama"), {"a": tiny_model("llama", seed=1)}
    config = {"num_stitches": 2}
    tensors = random_stitch_tensors(hub, experts, config)
    key = "base_model.model.model.layers.3.stitch_layer.gate.hub.weight"
    with pytest.raises(KeyError, match=r"layers\.3\.stitch_layer.gate.hub.weight"):
        stitched(hub, experts, {k: t for k, t in tensors.items() if k != key}, config)
    with pytest.raises(ValueError, match=r"layers\.1\.stitch_layer.gate.hub.weight"):
        stitched(hub, experts, tensors | {key.replace("layers.3", "layers.1"): tensors[key]}, config)
    with pytest.raises(ValueError, match=r"shape \(1, 32\), expected \(32, 32\)"):
        stitched(hub, experts, tensors | {key: tensors[key][:1]}, config)


@pytest.mark.parametrize("broken", ["hub", "a", "b"])
def test_an_error_in_one_model_is_raised_and_nothing_is_left_behind(broken):
    models = {"hub": tiny_model("llama"), "a": tiny_model("llama", seed=1), "b": tiny_model("llama", seed=2)}
    hub, experts = models["hub"], {"a": models["a"], "b": models["b"]}
    config = {"num_stitches": 2}
    tensors = random_stitch_tensors(hub, experts, config)

    def fail(module, args):
        raise ZeroDivisionError("on purpose")

    hook = models[broken].model.layers[2].mlp.register_forward_pre_hook(fail)
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        stitched(hub, experts, tensors, config)
    assert time.monotonic() - start < reference.TIMEOUT / 4  # nobody waited for the broken model
    hook.remove()
    hooks = [m for model in models.values() for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_a_model_that_never_comes_is_not_waited_for_forever(monkeypatch):
    hub, experts = tiny_model("llama"), {"a": tiny_model("llama", seed=1)}
    tensors = random_stitch_tensors(hub, experts, {})
    experts["a"].model.layers[0].register_forward_pre_hook(lambda layer, args: time.sleep(1))
    monkeypatch.setattr(reference, "TIMEOUT", 0.1)
    with pytest.raises(threading.BrokenBarrierError):
        stitched(hub, experts, tensors, {})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch):
    """Both paddings, either role, another depth and width; and every tensor of the file has a say."""
    for other, layers, width, mask in [("llama", 3, 48, LEFT), (arch, 5, 48, RIGHT)]:
        hub, experts = tiny_model(arch), {"a": tiny_model(other, layers=layers, width=width, seed=1)}
        config = {"num_stitches": 4, "gate": "token", "r": 2}
        tensors = random_stitch_tensors(hub, experts, config)
        for t in tensors.values():
            t.requires_grad_()
        out = reference_forward(hub, experts, tensors, config, IDS, attention_mask=mask)
        out[mask.bool()].square().mean().backward()
        assert out.shape == (2, 12, 64) and out.isfinite().all()
        assert torch.equal(out, stitched(hub, experts, tensors, config, attention_mask=mask))
        assert (out - logits(hub, attention_mask=mask)).abs().max() > 0.1
        silent = [key for key, t in tensors.items() if not t.grad.abs().max() > 1e-6]
        assert not silent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_zoo_models_depend_on_every_layer(arch, dtype):
    model = tiny_model(arch, dtype=dtype)
    masks = [None] if dtype == torch.float64 and arch in NO_FLOAT64_PADDING else [LEFT, RIGHT, None]
    for mask in masks:
        expected = logits(model, attention_mask=mask)
        assert expected.dtype == dtype and expected.isfinite().all()
    assert torch.equal(expected, logits(tiny_model(arch, dtype=dtype)))
    for layer in decoder_layers(model)[1]:
        hook = layer.register_forward_hook(  # skips the layer
            lambda layer, args, output: args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])
        )
        assert (logits(model) - expected).abs().max() > 0.1
        hook.remove()


@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_unsupported_architectures_can_be_built(arch):
    assert logits(tiny_model(arch)).isfinite().all()
    assert tiny_config(arch, layers=2).num_hidden_layers == 2
