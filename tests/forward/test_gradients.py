"""Training moves every stitch weight as the reference would, nothing else, and costs no graph it does not need."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model_state_dict

from peft_bts import StitchLayer
from tests.helpers.gradients import backward, close, trainable
from tests.helpers.models import FAMILIES, IDS, LEFT, adapter_file, fresh, logits, pristine, stitch
from tests.helpers.reference import decoder_layers, reference_forward
from tests.helpers.zoo import ARCHITECTURES


# The name under which transformers 5 and 4 both know it.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")


OPTIONS = {
    "plain": {},
    "small": {"gate": "token", "r": 3, "gate_bias": False},
    "projected": {"expert_streams": "projected"},
    "experts_into_hub": {"pattern": "experts_into_hub", "num_stitches": 2},
}


@pytest.mark.parametrize(
    ("arch", "options"),
    [(arch, option) for arch in ARCHITECTURES for option in (OPTIONS if arch in FAMILIES else ["plain"])],
)
def test_gradients(arch, options):
    """Every stitch weight's gradient is the reference's, and no weight of hub or expert has one."""
    options = OPTIONS[options]
    width = 32 if "expert_streams" in options else 48
    experts = {"a": {"arch": arch, "seed": 1}, "b": {"arch": "llama", "seed": 2, "layers": 6, "width": width}}
    experts = {name: (kwargs.pop("arch"), kwargs | {"dtype": torch.float64}) for name, kwargs in experts.items()}
    model = stitch(
        fresh(arch, dtype=torch.float64), {n: fresh(a, **kwargs) for n, (a, kwargs) in experts.items()}, **options
    )
    tensors, config = adapter_file(model)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    plain = {name: pristine(a, **kwargs) for name, (a, kwargs) in experts.items()}
    hub = pristine(arch, dtype=torch.float64)
    frozen = [p for m in (hub, *plain.values()) for p in m.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        reference_forward(hub, plain, leaves, config, IDS).square().mean().backward()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)

    model.train()
    gradients = backward(model)
    with torch.no_grad():  # under their names in the file
        for name, parameter in trainable(model).items():
            parameter.copy_(gradients[name])
    close(get_peft_model_state_dict(model), {key: leaf.grad for key, leaf in leaves.items()}, 1e-4)


def count_calls(layers):
    """How often parts of each layer run from now on (checkpoints run hooks of the layer itself only once)."""
    calls = [0] * len(layers)

    def count(i):
        def hook(module, args):
            calls[i] += 1

        return hook

    for i, layer in enumerate(layers):
        for part in list(layer.modules())[1:]:
            part.register_forward_pre_hook(count(i))
    return calls


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradient_checkpointing(arch, use_reentrant):
    """Gradient checkpointing recomputes layers of hub and experts alike, and changes no gradient."""
    expert = fresh(arch, seed=1, layers=6)
    model = stitch(fresh(arch), {"a": expert, "b": fresh("llama", seed=2, width=48)}).train()
    hub_layers = [getattr(x, "base_layer", x) for x in decoder_layers(model.get_base_model())[1]]
    calls = count_calls([*hub_layers, *decoder_layers(expert)[1]])

    expected = backward(model, attention_mask=LEFT)
    once = calls.copy()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close(backward(model, attention_mask=LEFT), expected, 1e-4)
    again = [after > 2 * before for before, after in zip(once, calls)]
    # The first stitch, after 1 of 4 hub layers and 2 of 6 of the expert, is into the expert; the next, into the hub.
    assert again[2:4] == [True] * 2 and again[4:] == [False] * 2 + [True] * 4

    calls[:] = [0] * len(calls)
    model.gradient_checkpointing_disable()
    close(backward(model, attention_mask=LEFT), expected, 1e-6)
    assert calls == once


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("arch", FAMILIES)
def test_gradient_checkpointing_of_trainer(arch, use_reentrant):
    """Trainer also asks for gradients of the inputs, which puts every hub layer under checkpoints."""
    model = stitch(fresh(arch), {"a": fresh(arch, seed=1)}).train()
    expected = backward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    close(backward(model), expected, 1e-4)
    model.eval()
    out = model.generate(
        input_ids=IDS, max_new_tokens=2, do_sample=False
    )  # as an evaluation in the middle of training
    assert out.shape == (2, 14)
    model.train()
    close(backward(model), expected, 1e-4)


@pytest.mark.parametrize("arch", FAMILIES)
def test_gradient_checkpointing_recomputes_no_layer_in_vain(arch):
    """Though Trainer asks for gradients of the inputs, layers before the first trained weight run only once."""
    model = stitch(fresh(arch), {"a": fresh(arch, seed=1)}).train()
    calls = count_calls([getattr(x, "base_layer", x) for x in decoder_layers(model.get_base_model())[1]])
    expected = backward(model)
    once = calls.copy()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    close(backward(model), expected, 1e-4)
    # The first stitch that leads into the hub is behind its layer 1.
    assert [after > 2 * before for before, after in zip(once, calls)] == [False, False, True, True]

    # A gradient that somebody does want.
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().mean().backward()
    assert embeds.grad.abs().max() > 0


def test_gradient_checkpointing_with_trained_embeddings():
    """`modules_to_save` in front of the first stitch are trained under gradient checkpointing too."""
    gradients = {}
    for use_reentrant in (None, False, True):
        model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, modules_to_save=["embed_tokens"]).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        gradients[use_reentrant] = backward(model)
        assert any("modules_to_save" in name for name in gradients[use_reentrant])
    close(gradients[False], gradients[None], 1e-4)
    close(gradients[True], gradients[None], 1e-4)


@pytest.mark.parametrize("expert_streams", ["intact", "projected"])
def test_gradient_checkpointing_with_one_expert_twice(expert_streams):
    """Recomputed layers of a model that serves as two experts belong to the right stream."""
    expert = fresh("llama", seed=1)
    model = stitch(fresh("llama"), {"a": expert, "b": expert}, expert_streams=expert_streams).train()
    expected = backward(model)
    model.gradient_checkpointing_enable()
    close(backward(model), expected, 1e-4)


def test_two_backwards_accumulate():
    """Gradient accumulation: the graphs of two forwards are apart."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}).train()
    first = model(input_ids=IDS).logits.square().mean()
    second = model(input_ids=IDS.flip(1)).logits.square().mean()
    second.backward()
    first.backward()
    both = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    model(input_ids=IDS.flip(1)).logits.square().mean().backward()
    close(both, {name: p.grad for name, p in trainable(model).items()}, 1e-5)


@pytest.mark.parametrize(
    ("arch", "dropout"), [("gpt2", "resid_pdrop"), ("llama", "attention_dropout"), ("opt", "dropout")]
)
def test_experts_have_no_dropout(arch, dropout):
    """In training the experts stay what they are at inference; only the hub's own dropout, if any, is noise."""
    noisy = fresh(arch, seed=1, **{dropout: 0.5})
    noisy.train()
    model = stitch(fresh("llama"), {"a": noisy})
    expected = logits(model)
    model.train()
    assert model.training and torch.equal(logits(model), expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model(input_ids=IDS).logits, expected)
    model.base_model.train()
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_gate_dropout_in_training_only():
    """`gate_dropout` is noise in training, and none at inference."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, gate_dropout=0.3)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@contextmanager
def saved_tensors(modules):
    """Counts the tensors that the graph keeps: {"all": ..., "inside": those of the given modules' forwards}."""
    counts, depth = {"all": 0, "inside": 0}, [0]

    def enter(module, args):
        depth[0] += 1

    def leave(module, args, output):
        depth[0] -= 1

    def pack(tensor):
        counts["all"] += 1
        counts["inside"] += depth[0] > 0
        return tensor

    hooks = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts
    for hook in hooks:
        hook.remove()


def graph_of(model, modules):
    with saved_tensors(list(modules)) as counts:
        model(input_ids=IDS)
    return counts


@pytest.mark.parametrize("arch", FAMILIES)
def test_experts_without_a_graph(arch):
    """`pattern="experts_into_hub"` trains without any gradient through experts: that is why it is the cheapest."""
    counts = {}
    for pattern in ("alternating", "experts_into_hub"):
        expert = fresh(arch, seed=1)
        model = stitch(fresh(arch), {"a": expert}, pattern=pattern).train()
        counts[pattern] = graph_of(model, decoder_layers(expert)[1])
    assert counts["experts_into_hub"]["inside"] == 0 < counts["alternating"]["inside"]
    assert counts["experts_into_hub"]["all"] < counts["alternating"]["all"]


@pytest.mark.parametrize("arch", FAMILIES)
def test_no_graph_before_the_first_stitch(arch):
    """Layers that come before any trained weight cost no memory for gradients; the layers behind it do."""
    expert = fresh(arch, seed=1)
    model = stitch(fresh(arch), {"a": expert}, layers_to_stitch=[1, 2, 3], pattern="alternating").train()
    hub = [x.base_layer if isinstance(x, StitchLayer) else x for x in decoder_layers(model.get_base_model())[1]]
    own = list(decoder_layers(expert)[1])
    # Into the hub after layer 1, into the expert after 2, into the hub after 3.
    assert [graph_of(model, [layer])["inside"] > 0 for layer in hub] == [False, False, True, True]
    assert [graph_of(model, [layer])["inside"] > 0 for layer in own] == [False, False, False, True]


def test_no_graph_at_all_without_grad():
    """Inference keeps nothing for a backward pass."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)})
    with torch.no_grad():
        assert graph_of(model, [])["all"] == 0


def test_an_optimizer_step_changes_the_stitches_only():
    """A few steps lower the loss, and every weight of seed and experts is bitwise what it was."""
    experts = {"a": fresh("llama", seed=1), "b": fresh("gpt2", seed=2)}
    hub = fresh("llama")
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in {"hub": hub, **experts}.items()}
    model = stitch(hub, experts).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, after in {"hub": model.unload(), **experts}.items():
        state = after.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in before[name].items())
