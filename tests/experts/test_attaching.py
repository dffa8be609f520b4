"""Experts come and go without a trace; what is loaded is used as it is, and never saved."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.helpers.checkpoints import (
    FIRST,
    LAST,
    assert_same,
    config,
    load,
    make,
    make_lora,
    save,
    state,
    stitches,
    train,
    trainable,
    two_adapters,
)
from tests.helpers.models import IDS, logits
from tests.helpers.zoo import tiny_model


def sources(root):
    return {
        "object": load(root, "law"),
        "path": str(root / "law"),
        "pathlike": root / "law",
        "dict": {"model": str(root / "law")},
        "lora": str(root / "lora"),
        "lora_dict": {"adapter": str(root / "lora")},
        "lora_on_model": {"model": str(root / "seed"), "adapter": str(root / "lora")},
    }


SOURCES = ["object", "path", "pathlike", "dict", "lora", "lora_dict", "lora_on_model"]


@pytest.mark.parametrize("trained", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("source", SOURCES)
def test_attach_then_detach_leaves_no_trace(root, source, trained):
    """Trying an expert must be free: logits, weights and config come back bitwise, and only new weights are added."""
    model = make(root)
    if trained:
        train(model)
    before, expected, experts = state(model), logits(model), copy.deepcopy(model.peft_config["default"].experts)
    names = trainable(model)
    model.attach_expert("new", sources(root)[source])
    assert sorted(model.peft_config["default"].experts) == ["code", "math", "new"]
    after = state(model)
    assert_same({key: after[key] for key in before}, before)
    assert not torch.equal(logits(model), expected)
    added = trainable(model) - names
    assert added == {n for n in after if "_layer.default" in n and (".for_new." in n)} and len(added) == 6
    train(model)
    model.load_state_dict(before, strict=False)
    model.detach_expert("new")
    assert_same(state(model), before)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].experts == experts and trainable(model) == names


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "object"])
def test_every_reference_survives_a_save(root, source):
    """An expert attached by reference is found again by whoever loads the adapter."""
    model = make(root)
    model.attach_expert("new", sources(root)[source])
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(save(model, root))), logits(model))


def test_an_expert_that_stays_keeps_its_weights(root):
    """Detaching one of several experts keeps the others' trained weights, bitwise."""
    model = train(make(root, "code math law"))
    before = get_peft_model_state_dict(model)
    kept = {key: tensor.clone() for key, tensor in before.items() if ".math." not in key}
    assert len(kept) == len(before) - 6
    model.detach_expert("math")
    assert_same(get_peft_model_state_dict(model), kept)
    train(model)


def test_a_loaded_model_is_used_as_it_is(root):
    """No copy of billions of weights; detach hands the object back with the flags it came with."""
    model, law = make(root), load(root, "law").train()
    law.transformer.wte.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in law.named_parameters()}
    model.attach_expert("law", law)
    assert model.base_model.experts["default"]["law"].model is law
    assert not law.training and not any(p.requires_grad for p in law.parameters())
    assert model.detach_expert("law") is law
    assert law.training and flags == {name: p.requires_grad for name, p in law.named_parameters()}
    assert not [m for m in law.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
def test_experts_get_their_flags_back_at_the_end(root, end):
    """A user who goes on training the expert must not find it frozen."""
    model, law = make(root), load(root, "law").train()
    model.attach_expert("law", law)
    model.unload() if end == "unload" else model.delete_adapter("default")
    assert law.training and all(p.requires_grad for p in law.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True], ids=["in_config", "attached"])
def test_a_lora_expert_costs_its_lora_only(root, options, dtype, late):
    """It equals the standalone LoRA model exactly, shares all of the seed's storage, and never gets into the file."""
    name = f"lora{len(options) and next(iter(options))}"
    if not (root / name).exists():
        make_lora(root, name, **options)
    model = make(root, "code" if late else f"code {name}", dtype=dtype)
    if late:
        model.attach_expert(name, str(root / name))
    alone = PeftModel.from_pretrained(load(root, "seed", dtype=dtype), root / name)
    lora = model.base_model.experts["default"][name].model
    assert torch.equal(logits(lora), logits(alone)) and not torch.equal(
        logits(lora), logits(load(root, "seed", dtype=dtype))
    )

    hub = {p.data_ptr() for p in model.get_base_model().parameters()}
    own = [key for key, p in lora.named_parameters() if p.data_ptr() not in hub]
    assert own and all("lora_" in key or "modules_to_save" in key or "trainable_tokens" in key for key in own)
    assert not [key for key in trainable(model) if "stitch_layer" not in key]

    folder = save(train(model), root)
    assert all(".stitch_layer." in key for key in load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)), logits(model))


def test_a_lora_expert_as_an_object_equals_one_by_path(root):
    """Sharing the seed's weights is a saving, not another model."""
    by_path, by_object = make(root, "code"), make(root, "code")
    by_path.attach_expert("lora", str(root / "lora"))
    by_object.attach_expert("lora", PeftModel.from_pretrained(load(root, "seed"), root / "lora"))
    by_object.load_state_dict(by_path.state_dict())
    assert torch.equal(logits(by_path), logits(by_object))


def test_switching_adapters_leaves_lora_experts_alone(root):
    """PEFT's set_adapter and friends walk over LoRA layers by adapter name; an expert's have the same names."""
    model = make(root, "code lora")
    model.add_adapter("other", config(root, "lora"))
    lora = model.base_model.experts["default"]["lora"].model
    expected, names = logits(lora), trainable(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(lora), expected)
    assert trainable(model) == names
    with model.disable_adapter():
        assert torch.equal(logits(lora), expected)
    model.delete_adapter("other")
    assert torch.equal(logits(lora), expected)


@pytest.mark.parametrize("init", ["zero", "hub", "closed"])
def test_init_of_a_new_experts_gates(root, init):
    """How far a new expert changes a trained model from the first token on is what the user chose by `init`."""
    model = make(root, init_weights=True)
    train(model)
    before, old = logits(model), get_peft_model_state_dict(model)
    model.attach_expert("law", load(root, "law"), init=init)
    new = get_peft_model_state_dict(model)
    weight, bias = new[f"{LAST}.gate.law.weight"], new[f"{LAST}.gate.law.bias"]
    if init == "hub":
        assert torch.equal(weight, old[f"{LAST}.gate.hub.weight"])
        assert torch.equal(bias, old[f"{LAST}.gate.hub.bias"] - 2)
    else:
        assert not weight.any() and (bias == {"zero": 0, "closed": -6}[init]).all()
    assert not new[f"{FIRST}.gate.law.weight"].any() and not new[f"{FIRST}.gate.law.bias"].any()
    for stitch in (FIRST, LAST):
        projection = new[f"{stitch}.proj.law.weight"]
        assert torch.equal(projection, torch.eye(*projection.shape))
    change = (logits(model) - before).norm() / before.norm()
    assert change < 0.01 if init == "closed" else change > 0.01


@pytest.mark.parametrize("start", ["code math", "", "all detached"], ids=lambda start: start or "none")
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no_autocast"])
def test_new_weights_are_like_the_adapters(root, start, autocast):
    """Frozen new stitches would train to nothing without a word; those of another dtype would not run in half."""
    dtype = torch.bfloat16
    model = make(root, start if start == "" else "code math", dtype=dtype, autocast_adapter_dtype=autocast)
    if start == "all detached":
        for name in ("code", "math"):
            model.detach_expert(name)
    model.attach_expert("new", load(root, "law", dtype=dtype))
    assert {p.dtype for p in stitches(model)} == {torch.float32 if autocast else dtype}
    assert all(p.requires_grad for p in stitches(model))
    assert model.get_model_status().requires_grad == {"default": True}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in stitches(model))


@pytest.mark.parametrize("how", ["loaded", "inactive"])
def test_new_weights_of_a_frozen_adapter_are_frozen(root, how):
    """Else an expert attached for inference would be trained along with whatever is trained next."""
    if how == "loaded":
        model = PeftModel.from_pretrained(load(root, "seed"), save(make(root), root))
    else:
        model = two_adapters(root)
        model.set_adapter("other", inference_mode=True)
    model.attach_expert("new", load(root, "law"))
    assert not trainable(model)


def test_attach_goes_to_the_active_adapter_only(root):
    """The other adapter must neither see the new expert nor be changed by it."""
    model = two_adapters(root)
    expected = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.attach_expert("math", str(root / "math"))
    assert not torch.equal(logits(model), other)
    assert not [name for name in trainable(model) if ".stitch_layer.other." not in name]
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.detach_expert("math")
    model.set_adapter("other")
    model.detach_expert("math")
    assert torch.equal(logits(model), other)


def test_attach_while_disabled_or_frozen(root):
    """Attaching inside `disable_adapter` changes nothing there, and takes effect after it."""
    model = make(root)
    before = logits(model)
    with model.disable_adapter():
        model.attach_expert("law", load(root, "law"))
        assert torch.equal(logits(model), logits(load(root, "seed")))
    assert not torch.equal(logits(model), before)


def test_experts_have_no_dropout_of_their_own(root):
    """model.train() must not add noise to frozen experts; that would train stitches for models that nobody runs."""
    model = make(root)
    noisy = tiny_model("gpt2", seed=3, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.attach_expert("noisy", noisy)
    expected = logits(model.eval())
    model.train()
    assert model.training and not any(module.training for module in noisy.modules())
    assert torch.equal(logits(model), expected)
    logits(noisy.train())
    model.train()
    assert torch.equal(logits(model), expected)


def test_experts_never_get_into_the_file(root):
    """An adapter of a few MB that carries gigabytes of a third party's weights must not be uploaded."""
    model = make(root, "code math lora")
    model.attach_expert("law", load(root, "law"))
    for kwargs in [{}, {"state_dict": model.state_dict()}, {"safe_serialization": False}]:
        folder = save(model, root, **kwargs)
        file = folder / "adapter_model.safetensors"
        saved = load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)
        assert len(saved) == 4 * 3 + 2 + 4 * 3 and all(".stitch_layer." in key for key in saved)
        assert sorted(path.name for path in folder.iterdir() if "adapter_model" in path.name) == [
            "adapter_model.safetensors" if file.exists() else "adapter_model.bin"
        ]
