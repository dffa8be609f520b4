"""Several adapters on one hub, disabled, deleted and unloaded: each is the model that it is alone."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.helpers.checkpoints import (
    assert_same,
    assert_untouched,
    config,
    load,
    make,
    save,
    state,
    stitches,
    train,
    trainable,
    two_adapters,
)
from tests.helpers.models import logits
from tests.helpers.zoo import tiny_model


@pytest.mark.parametrize(
    "first, second",
    [("default", "other"), ("test-adapter", "other"), ("a", "ab"), ("ab", "a"), ("code", "math"), ("law", "lora")],
)
def test_two_adapters_are_two_models(root, first, second):
    """Adapters of any two names do on one hub what they do alone, and are saved and loaded without mix-up."""
    model = two_adapters(root, first, second)
    folder = save(model, root)
    results = {}
    for name in (first, second, first):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(load(root, "seed"), folder / name if name != "default" else folder)
        assert torch.equal(logits(model), logits(alone))
        results[name] = logits(model)
    assert not torch.equal(*results.values())

    reloaded = PeftModel.from_pretrained(load(root, "seed"), folder / second, adapter_name=second)
    reloaded.load_adapter(folder / first if first != "default" else folder, first)
    for name, expected in results.items():
        reloaded.set_adapter(name)
        assert torch.equal(logits(reloaded), expected)


@pytest.mark.parametrize("name", ["1", "3", "weight", "bias", "for_code", "hub", "gate", "model", "layers", "experts"])
def test_no_adapter_name_costs_weights(root, name):
    """PEFT drops keys by substring when it saves: such names are refused, or both adapters survive; never silence."""
    model = make(root)
    expected = logits(model)
    try:
        model.add_adapter(name, config(root, "code law"))
    except ValueError as error:
        assert repr(name) in str(error)
        assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]
        return
    folder = save(model, root)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder)), expected)
    model.set_adapter(name)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder / name)), logits(model))


def test_training_one_adapter_leaves_the_other(root):
    """A second adapter must not be trained along, nor lose its trainability for good."""
    model = two_adapters(root)
    before = state(model)
    model.set_adapter("other")
    assert trainable(model) == {name for name in before if ".stitch_layer.other." in name}
    train(model)
    model.set_adapter("default")
    after = state(model)
    assert_same(
        {k: v for k, v in after.items() if ".other." not in k}, {k: v for k, v in before.items() if ".other." not in k}
    )
    assert trainable(model) == {name for name in before if ".stitch_layer.default." in name}


@pytest.mark.parametrize("deleted", ["default", "other"])
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_delete_adapter(root, deleted, active):
    """Deleting an adapter, the active one too, leaves the other as if it had been alone all along."""
    model = two_adapters(root)
    kept = "other" if deleted == "default" else "default"
    model.set_adapter(kept)
    expected = logits(model)
    model.set_adapter(active)
    model.delete_adapter(deleted)
    assert list(model.peft_config) == model.active_adapters == [kept]
    assert torch.equal(logits(model), expected)
    status = model.get_model_status()
    assert status.available_adapters == [kept] and status.num_adapter_layers == (2 if kept == "default" else 3)
    assert not [name for name in model.state_dict() if f".{deleted}." in name]
    assert list(model.base_model.experts.keys()) == [kept]


def test_delete_the_last_adapter(root):
    """The hub is bitwise what it was, without a hook; and can be stitched again."""
    seed = load(root, "seed")
    expected, before = logits(seed), state(seed)
    torch.manual_seed(0)
    model = get_peft_model(seed, config(root))
    stitched = logits(model)
    model.delete_adapter("default")
    assert_untouched(seed)
    assert_same(state(seed), before)
    assert torch.equal(logits(seed), expected)
    torch.manual_seed(0)
    model.add_adapter("again", config(root))
    model.set_adapter("again")
    assert torch.equal(logits(model), stitched)


@pytest.mark.parametrize("experts", ["code math", "lora"])
def test_disable_adapter_is_the_seed(root, experts):
    """Needed to compare with the seed (and by DPO as the reference model): bitwise, nested, and after errors."""
    seed = logits(load(root, "seed"))
    model = make(root, experts)
    stitched = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), seed)
        with model.disable_adapter():
            assert torch.equal(logits(model), seed)
        assert torch.equal(logits(model), seed)
    assert torch.equal(logits(model), stitched) and not torch.equal(stitched, seed)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _ = 1 / 0
    assert torch.equal(logits(model), stitched)
    assert len(trainable(model)) == len(stitches(model))


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"], ["down_proj"]], ids=str)
def test_the_seed_is_given_back(root, end, modules_to_save):
    """The very object, bitwise, without a hook, and ready to be stitched again."""
    seed = load(root, "seed")
    expected, before = logits(seed), state(seed)
    options = {"modules_to_save": modules_to_save}
    torch.manual_seed(0)
    model = get_peft_model(seed, config(root, **options))
    stitched = logits(model)
    train(model)
    if end == "unload":
        assert model.unload() is seed
    else:
        model.delete_adapter("default")
    assert_untouched(seed)
    assert_same(state(seed), before)
    assert torch.equal(logits(seed), expected)
    torch.manual_seed(0)
    assert torch.equal(logits(get_peft_model(seed, config(root, **options))), stitched)


def test_a_config_belongs_to_its_caller(root):
    """One config object may serve hubs of other depths and several adapters; attach and detach do not edit it."""
    shared = config(root)
    experts = copy.deepcopy(shared.experts)
    first = get_peft_model(load(root, "seed"), shared)
    second = get_peft_model(load(root, "law"), shared)
    first.add_adapter("twin", shared)
    before = copy.deepcopy(shared.to_dict())
    for model, layers in [(first, ["1", "3"]), (second, ["0", "2"])]:
        model.attach_expert("extra", load(root, "code"))
        model.detach_expert("math")
        wrapped = [status.name.rpartition(".")[2] for status in model.get_layer_status()]
        assert wrapped == layers
        logits(model)
    assert shared.to_dict() == before and shared.experts == experts
    first.set_adapter("twin")
    assert sorted(first.peft_config["twin"].experts) == ["code", "math"]
    assert sorted(first.peft_config["default"].experts) == ["code", "extra"]
    logits(first)


def test_an_expert_of_two_adapters_is_loaded_once(root):
    """Experts are the memory; a second adapter of the same reference must cost its stitches only."""
    model = two_adapters(root)
    experts = model.base_model.experts
    assert experts["default"]["code"].model is experts["other"]["code"].model
    model.load_adapter(save(make(root), root), "third")
    assert experts["third"]["math"].model is experts["default"]["math"].model
    model.set_adapter("third")
    expected = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    assert not [name for name in trainable(model) if "stitch_layer" not in name]


def test_an_adapter_made_from_anothers_config_has_its_experts(root):
    """As TRL's DPOTrainer makes its reference: experts in memory are shared, also those that came from no path."""
    model = make(root, "code")
    for name, expert in (("object", tiny_model("llama", seed=5)), ("law", load(root, "law")), ("lora", root / "lora")):
        model.attach_expert(name, expert)
    model.add_adapter("ref", model.peft_config["default"])
    experts = model.base_model.experts
    assert all(experts["ref"][name] is experts["default"][name] for name in ("code", "object", "law", "lora"))
    assert model.peft_config["ref"].experts == model.peft_config["default"].experts
    for name, parameter in model.named_parameters():
        if ".stitch_layer.default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.detach_expert("object")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_an_object_attached_to_two_adapters_stays_frozen_until_both_let_go(root):
    """Else detaching from one adapter would silently unfreeze the other's expert."""
    model = make(root)
    model.add_adapter("other", config(root, "code"))
    law = load(root, "law").train()
    for name in ("default", "other"):
        model.set_adapter(name)
        model.attach_expert("law", law)
    assert model.detach_expert("law") is law
    assert not law.training and not any(p.requires_grad for p in law.parameters())
    model.set_adapter("default")
    assert model.detach_expert("law") is law
    assert law.training and all(p.requires_grad for p in law.parameters())
