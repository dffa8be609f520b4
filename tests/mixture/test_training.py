"""Training with `output="mixture"`: loss and gradients are the reference's, and gates alone cost no graph."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from peft_bts.forward import mixed_head
from tests.helpers.gradients import close, trainable
from tests.helpers.models import (
    FAMILIES,
    IDS,
    LEFT,
    adapter_file,
    assert_near,
    expected_logits,
    fresh,
    logits,
    pristine,
    stitch,
)
from tests.helpers.reference import decoder_layers, reference_forward
from tests.helpers.zoo import ARCHITECTURES


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")

LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[3], [7]]), -100)
OPTIONS = {
    "alone": {"num_stitches": 0},
    "stitched": {},
    "experts_into_hub": {"pattern": "experts_into_hub", "num_stitches": 2, "gate": "token", "r": 2},
    "projected": {"expert_streams": "projected"},
}


def mixture(arch="llama", dtype=torch.float32, width=48, **options):
    """A model that mixes outputs, in training mode, with an expert of its hub's kind and one of another size."""
    experts = {"a": fresh(arch, seed=1, dtype=dtype), "b": fresh("llama", seed=2, layers=6, width=width, dtype=dtype)}
    return stitch(fresh(arch, dtype=dtype), experts, output="mixture", **options).train()


def backward(model, **call):
    """The gradients of the loss, by name of the weight; no other weight has one."""
    model.zero_grad()
    model(**{"input_ids": IDS, "labels": LABELS} | call).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def next_token_loss(logits, labels=LABELS):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("arch", "options"),
    [(arch, option) for arch in ARCHITECTURES for option in (OPTIONS if arch in FAMILIES else ["alone", "stitched"])],
)
def test_gradients(arch, options):
    """Every weight's gradient is the reference's; without stitches the output gates alone have one."""
    alone, width = options == "alone", 32 if options == "projected" else 48
    options = OPTIONS[options]
    model = mixture(arch, torch.float64, width, **options)
    tensors, config = adapter_file(model)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    plain = {
        "a": pristine(arch, seed=1, dtype=torch.float64),
        "b": pristine("llama", seed=2, layers=6, width=width, dtype=torch.float64),
    }
    expected = next_token_loss(reference_forward(pristine(arch, dtype=torch.float64), plain, leaves, config, IDS))
    expected = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()))))

    gradients = backward(model)
    with torch.no_grad():  # under their names in the file
        for name, parameter in trainable(model).items():
            parameter.copy_(gradients[name])
    close(get_peft_model_state_dict(model), expected, 1e-4)
    assert not alone or sorted(expected) == sorted(
        f"base_model.model.stitch_output.gate.{name}.{part}"
        for name in ("a", "b", "hub")
        for part in ("bias", "weight")
    )


@pytest.mark.parametrize("options", ["alone", "stitched"])
def test_gradients_of_any_loss_on_logits(options):
    """The returned log probabilities carry gradients of their own: distillation and the like train through them."""
    model = mixture(dtype=torch.float64, **OPTIONS[options])
    target = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def divergence(logits):
        return F.kl_div(logits, target, reduction="batchmean", log_target=True)

    tensors, config = adapter_file(model)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    plain = {
        name: pristine("llama", dtype=torch.float64, **o)
        for name, o in {"a": {"seed": 1}, "b": {"seed": 2, "layers": 6, "width": 48}}.items()
    }
    loss = divergence(reference_forward(pristine("llama", dtype=torch.float64), plain, leaves, config, IDS))
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    divergence(model(input_ids=IDS).logits).backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(parameter.grad)
    close(get_peft_model_state_dict(model), expected, 1e-4)


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("chunk", [64 * 5, 2**24])
def test_loss(chunk, monkeypatch):
    """As the plain models' own loss function has it, of the mixture's logits, however it is asked for."""
    monkeypatch.setattr(mixed_head, "_CHUNK", chunk)
    model = mixture()
    plain = {"a": pristine("llama", seed=1), "b": pristine("llama", seed=2, layers=6, width=48)}
    mixed = expected_logits(model, pristine("llama"), plain).float()
    own, shifted = pristine("llama").loss_function, F.pad(LABELS, (0, 1), value=-100)[:, 1:]
    for asked in (
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"shift_labels": shifted.roll(1, 1)},
        {"shift_labels": shifted.roll(1, 1), "num_items_in_batch": 7},
        {"ignore_index": int(IDS[0, 5])},
    ):
        labels = IDS if "ignore_index" in asked else LABELS
        out = model(input_ids=IDS, labels=labels, **asked)
        assert_near(out.loss, own(mixed, labels, vocab_size=64, **asked), 1e-5)
        assert_near(out.logits, mixed, 2e-4)
    assert model(input_ids=IDS).loss is None


def test_loss_function_of_the_users_own():
    """A loss function that was set on the hub gets the mixture's logits, and what was passed to the model for it."""
    model, calls = mixture(), []

    def loss_function(logits, labels, vocab_size, temperature=1.0, **kwargs):
        calls.append((vocab_size, temperature, kwargs.get("num_items_in_batch")))
        return next_token_loss(logits / temperature, labels)

    model.get_base_model().loss_function = loss_function
    out = model(input_ids=IDS, labels=LABELS, temperature=0.5, num_items_in_batch=3)
    assert calls == [(64, 0.5, 3)]
    assert_near(out.loss, next_token_loss(out.logits / 0.5), 1e-6)


def test_loss_of_a_hub_of_experts():
    """The hub's own balancing loss, where it is asked for, is added as the hub adds it."""
    model = mixture("mixtral", num_stitches=0)
    with torch.no_grad():
        without, out = (model(input_ids=IDS, labels=LABELS, output_router_logits=x) for x in (False, True))
        hub = pristine("mixtral")(input_ids=IDS, labels=LABELS, output_router_logits=True)
    assert_near(out.aux_loss, hub.aux_loss, 1e-5)
    assert_near(out.loss - without.loss, hub.aux_loss * pristine("mixtral").router_aux_loss_coef, 1e-3)
    assert without.aux_loss is None


def test_loss_of_some_positions():
    """`labels` beside `logits_to_keep`: the loss of the logits that are returned."""
    model = mixture()
    out = model(input_ids=IDS, labels=LABELS, logits_to_keep=5)
    assert_near(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS[:, -4:].flatten()), 1e-5)


# ----------------------------------------------------------------------------------------------------------- the graph


def kept_by(model, **call):
    """The tensors, beside weights, that the graph of a loss keeps for the backward pass; and the loss."""
    kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if (pointer := tensor.untyped_storage().data_ptr()) not in weights:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=LABELS, **call).loss
    return list(kept.values()), loss


@pytest.mark.parametrize("embeddings_require_grads", [False, True])
@pytest.mark.parametrize("arch", FAMILIES)
def test_gates_alone_keep_no_graph_through_models(arch, embeddings_require_grads):
    """Nothing in hub or expert is computed with gradients, though Trainer asks for those of the embeddings."""
    model = mixture(arch, num_stitches=0)
    if embeddings_require_grads:
        model.enable_input_require_grads()
    recorded = []
    for name in ("hub", "a", "b"):
        inner = model.get_base_model() if name == "hub" else model.base_model.experts["default"][name].model
        for layer in decoder_layers(inner)[1]:
            layer.register_forward_hook(lambda module, args, output: recorded.append(torch.is_grad_enabled()))
    kept, loss = kept_by(model)
    assert len(recorded) == 4 + 4 + 6 and not any(recorded)
    # Of each token: the states that the three heads read, and a few numbers per gate.
    assert loss.requires_grad and sum(tensor.numel() for tensor in kept) < IDS.numel() * (32 + 32 + 48 + 12)
    loss.backward()


@pytest.mark.parametrize("options", ["alone", "stitched"])
def test_no_logits_are_kept(options, monkeypatch):
    """No tensor the size of the vocabulary waits for the backward pass: heads run again then, if at all."""
    monkeypatch.setattr(mixed_head, "_CHUNK", 4 * 1024)
    hub, experts = fresh("llama", vocab=1024), {"a": fresh("llama", seed=1, vocab=1024)}
    model = stitch(hub, experts, output="mixture", **OPTIONS[options]).train()
    head_calls = []
    experts["a"].lm_head.register_forward_hook(lambda module, args, output: head_calls.append(output.shape[-2]))
    kept, loss = kept_by(model)
    assert not [tensor.shape for tensor in kept if 1024 in tensor.shape]
    assert head_calls == [4] * 6  # 24 tokens
    loss.backward()
    assert head_calls == [4] * (6 if options == "alone" else 12)  # the gates' gradients need no logits again


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", ["alone", "stitched", "experts_into_hub"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_gradient_checkpointing(arch, options, use_reentrant):
    """Recomputing the layers as well changes no gradient, with the embeddings' gradients as Trainer asks for them."""
    model = mixture(arch, **OPTIONS[options])
    expected = backward(model, attention_mask=LEFT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close(backward(model, attention_mask=LEFT), expected, 1e-4)
    model.enable_input_require_grads()
    close(backward(model, attention_mask=LEFT), expected, 1e-4)
    model.gradient_checkpointing_disable()
    close(backward(model, attention_mask=LEFT), expected, 1e-5)


@pytest.mark.parametrize("options", ["alone", "stitched"])
def test_gradients_of_embeddings(options):
    """A gradient that somebody does want, as soft prompts do, goes through all models."""
    model = mixture(width=32, dtype=torch.float64, **OPTIONS[options])
    tensors, config = adapter_file(model)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=LABELS).loss.backward()
    plain = {
        "a": pristine("llama", seed=1, dtype=torch.float64),
        "b": pristine("llama", seed=2, layers=6, width=32, dtype=torch.float64),
    }
    twin = embeds.detach().clone().requires_grad_()
    hub = pristine("llama", dtype=torch.float64)
    next_token_loss(reference_forward(hub, plain, tensors, config, None, inputs_embeds=twin)).backward()
    for one in (hub, *plain.values()):
        one.zero_grad()
    assert_near(embeds.grad, twin.grad, 1e-4)


def test_modules_to_save():
    """A module of the hub that is trained beside the gates gets its gradient."""
    model = mixture(num_stitches=0, modules_to_save=["lm_head"])
    gradients = backward(model)
    assert any("lm_head.modules_to_save" in name for name in gradients) and len(gradients) == 7
    assert all(gradient.any() for gradient in gradients.values())


# ------------------------------------------------------------------------------------------------------------- Trainer


def test_trainer_trains_gates_alone(tmp_path):
    """The loss goes down, the file has the gates and nothing else, and no other weight has changed."""
    model = mixture(num_stitches=0)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        logging_steps=1,
        save_steps=30,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    plain = {"a": pristine("llama", seed=1), "b": pristine("llama", seed=2, layers=6, width=48)}
    model.eval()
    expected = next_token_loss(expected_logits(model, pristine("llama"), plain), IDS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    tensors, config = adapter_file(model)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"base_model.model.stitch_output.gate.{name}.{part}": (1, 32) if part == "weight" else (1,)
        for name in ("a", "b", "hub")
        for part in ("weight", "bias")
    }
    assert config["output"] == "mixture" and config["num_stitches"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert logits(model).isfinite().all()
