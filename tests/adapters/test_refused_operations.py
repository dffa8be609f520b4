"""What PEFT offers and stitches cannot do is refused, with what to do instead; everything stays usable as it was."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from tests.helpers.bad_input import config, refused, stitched
from tests.helpers.models import IDS, fresh, logits, pristine


def test_merging():
    """No single model's weights can express a stitched model: merging is refused, unloading works."""
    model = stitched()
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with refused(model, match=r"cannot be merged into the hub.*unload\(\)"):
            merge()
    assert torch.equal(logits(model.unload()), logits(pristine("llama")))


def test_two_active_adapters():
    """One adapter at a time: two schedules cannot both run."""
    model = stitched()
    model.add_adapter("second", config(num_stitches=2))
    with refused(model, match=r"Only one stitch adapter.*\['default', 'second'\]"):
        model.base_model.set_adapter(["default", "second"])
    with refused(model, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "second"])
    with refused(model, match="third", error=(ValueError, KeyError)):
        model.set_adapter("third")
    with refused(model, match="third", error=(ValueError, KeyError)):
        model.delete_adapter("third")


def test_mixed_model():
    """PEFT's mixed models take no stitches, and say so."""
    hub = fresh("llama")
    with refused(hub, match="STITCH"):
        get_peft_model(hub, config(), mixed=True)


def test_direct_injection(adapter):
    """Ways round `get_peft_model` would lose the experts; PEFT refuses them, and the hub stays whole."""
    hub = fresh("llama")
    with refused(hub, match="STITCH.*get_peft_model"):
        inject_adapter_in_model(config(experts={"code": str(adapter / "code")}), hub)
    with refused(hub, match="STITCH.*get_peft_model"):
        hub.load_adapter(str(adapter / "adapter"))
    with pytest.raises(ValueError, match=r"STITCH.*get_peft_model"):
        AutoModelForCausalLM.from_pretrained(adapter / "adapter")
