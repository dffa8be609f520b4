"""What PEFT offers and stitches cannot do is refused, with what to do instead; everything stays usable as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
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


@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_stitching_twice(output):
    """A notebook's cell that is run again: the model stays as it was, and the way that the error names works."""
    model = stitched(output=output, num_stitches=0 if output == "mixture" else 4)
    hub = model.get_base_model()
    for again in (hub, model):
        with refused(model, match=r"stitched already.*hub = model.unload\(\).*add_adapter"):
            get_peft_model(again, config(num_stitches=1))
        with refused(model, match=r"stitched already"):
            get_peft_model(again, config(num_stitches=1), adapter_name="other")
    hub = model.unload()
    assert torch.equal(logits(get_peft_model(hub, config()).unload()), logits(pristine("llama")))


def test_a_hub_with_a_lora():
    """What the file could not refer to is refused: a later load would give another model."""
    hub = get_peft_model(fresh("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with refused(hub, match=r"PeftModel with a LORA adapter.*merge_and_unload\(\)"):
        get_peft_model(hub, config())
    with refused(hub, match=r"layers of another PEFT method \(Linear\)"):
        get_peft_model(hub.get_base_model(), config())


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
    with pytest.raises(OSError, match=r"\.\./hub"):  # transformers does not know where relative paths start
        AutoModelForCausalLM.from_pretrained(adapter / "adapter")
