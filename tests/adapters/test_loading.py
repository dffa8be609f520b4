"""Every way in which PEFT saves and loads an adapter gives the same model, bitwise."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from peft_bts import StitchConfig
from tests.helpers.checkpoints import load, make, save, stitches, train, trainable, two_adapters
from tests.helpers.models import logits


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter_name": "renamed"},
        {"adapter_name": "test-adapter", "low_cpu_mem_usage": True},
        {"is_trainable": True},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": True, "is_trainable": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_save_then_from_pretrained(root, options, safe):
    """The trained stitches are what the user paid for; every way to load them gives the same function, bitwise."""
    model = train(make(root, "code math lora"))
    folder = save(model, root, safe_serialization=safe)
    assert (folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")).is_file()
    loaded = PeftModel.from_pretrained(load(root, "seed"), folder, **options)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.active_adapters == [options.get("adapter_name", "default")]
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    own = stitches(loaded, options.get("adapter_name", "default"))
    assert all(p.requires_grad == options.get("is_trainable", False) for p in own)
    assert len(trainable(loaded)) == (len(own) if options.get("is_trainable") else 0)
    if options.get("is_trainable"):
        train(loaded)


def test_auto_peft_model_loads_seed_experts_and_stitches(root):
    """The one-call load of the model card; also of adapters that were made without a task type."""
    for task_type in ("CAUSAL_LM", None):
        model = train(make(root, task_type=task_type))
        folder = save(model, root)
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), logits(model))
    model = train(make(root))
    folder = save(model, root)
    for options in [{"low_cpu_mem_usage": True}, {"config": StitchConfig.from_pretrained(folder)}]:
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder, **options)
        assert torch.equal(logits(loaded), logits(model))
    trained_on = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert len(trainable(trained_on)) == len(stitches(model))


def test_from_pretrained_with_a_config(root):
    """`config=` is the only way to say where experts have moved, and must not be edited by the load."""
    model = make(root)
    folder = save(model, root)
    handed_over = StitchConfig.from_pretrained(folder)
    before = copy.deepcopy(handed_over.experts)
    loaded = PeftModel.from_pretrained(load(root, "seed"), folder, config=handed_over)
    assert torch.equal(logits(loaded), logits(model))
    loaded.attach_expert("law", load(root, "law"))
    loaded.detach_expert("code")
    assert handed_over.experts == before


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_load_adapter_beside_another(root, options):
    """Two stitched generalists on one seed, switched without reloading; the active one is not disturbed."""
    first, second = train(make(root)), train(make(root, "code law", layers_to_stitch=[0, 3], r=2))
    folder = save(second, root)
    before = logits(first)
    first.load_adapter(folder, "second", **options)
    assert first.active_adapters == ["default"] and torch.equal(logits(first), before)
    assert all(p.requires_grad == options.get("is_trainable", False) for p in stitches(first, "second"))
    first.set_adapter("second")
    assert torch.equal(logits(first), logits(second))
    first.set_adapter("default")
    assert torch.equal(logits(first), before)


def test_load_adapter_over_an_existing_one(root):
    """What `load_best_model_at_end` does: the same name again takes the file's weights."""
    model = train(make(root))
    folder, expected = save(model, root), logits(model)
    train(model)
    assert not torch.equal(logits(model), expected)
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)
    assert len(trainable(model)) == len(stitches(model))


def test_selected_adapters_only_are_saved(root):
    """Otherwise a private adapter would be uploaded along with the public one."""
    model = two_adapters(root)
    folder = save(model, root, selected_adapters=["other"])
    assert not (folder / "adapter_config.json").exists()
    loaded = PeftModel.from_pretrained(load(root, "seed"), folder / "other")
    model.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))
