"""What PEFT says of a stitched model: counts of weights, and the state of its adapters."""

import pytest
from peft import PeftModel, get_peft_model_state_dict

from tests.helpers.checkpoints import load, make, save, stitches, two_adapters


def test_counts_are_those_of_the_stitches(root, capsys):
    """A user reads here whether a seed of billions of weights was left trainable by accident."""
    model = make(root)
    stitched = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    total = stitched + sum(load(root, name).num_parameters() for name in ("seed", "code", "math"))
    assert model.get_nb_trainable_parameters() == (stitched, total)
    model.print_trainable_parameters()
    assert f"trainable params: {stitched:,} || all params: {total:,}" in capsys.readouterr().out


@pytest.mark.parametrize("experts", ["code math", "lora", "code lora"])
def test_model_status(root, experts):
    """`get_model_status` is how PEFT's users debug; a LoRA expert inside must not show up as an adapter layer."""
    model = make(root, experts)
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "StitchModel")
    assert status.peft_types == {"default": "STITCH"}
    assert (status.num_adapter_layers, status.enabled, status.merged_adapters) == (2, True, [])
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for p in stitches(model))
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True
    assert PeftModel.from_pretrained(load(root, "seed"), save(model, root)).get_model_status().requires_grad == {
        "default": False
    }


def test_status_of_two_adapters_with_different_schedules(root):
    """Layers that only one adapter stitches must not make the other look broken ("irregular")."""
    model = two_adapters(root)
    layers = {status.name: status for status in model.get_layer_status()}
    assert sorted(layers) == [f"model.model.layers.{i}" for i in range(4)]
    have = {name[-1]: status.available_adapters for name, status in layers.items()}
    assert have == {"0": ["other"], "1": ["default"], "2": ["other"], "3": ["default", "other"]}
    for active, requires_grad in [
        ("default", {"default": True, "other": False}),
        ("other", {"default": False, "other": True}),
    ]:
        model.set_adapter(active)
        status = model.get_model_status()
        assert status.requires_grad == requires_grad
        assert (status.active_adapters, status.available_adapters) == ([active], ["default", "other"])
        assert (status.enabled, status.num_adapter_layers) == (True, 4)
        assert status.trainable_params == sum(p.numel() for p in stitches(model, active))
