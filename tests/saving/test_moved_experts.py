"""Experts that moved or were replaced are named in the config; everything else about the adapter stays."""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.checkpoints import load, make, read
from tests.helpers.models import logits
from tests.helpers.zoo import tiny_model


def test_a_moved_expert_is_found_through_the_config(root, tmp_path):
    """Paths change; the error says which expert is missing and how to point to it, and doing that works."""
    home = tmp_path / "home"
    shutil.copytree(root / "code", home)
    model = make(root, "math")
    model.attach_expert("code", str(home))
    model.save_pretrained(tmp_path / "saved")
    home.rename(tmp_path / "new_home")
    with pytest.raises(ValueError, match=r"(?s)'code'.*home.*experts\[\"code\"\]\[\"model\"\]"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")

    handed_over = StitchConfig.from_pretrained(tmp_path / "saved")
    handed_over.experts["code"]["model"] = str(tmp_path / "new_home")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again")[1]["experts"]["code"]["model"] == "../new_home"


def test_an_expert_can_be_replaced_through_the_config(root, tmp_path):
    """A later version of an expert may take its place; one of another shape is refused by name."""
    make(root).save_pretrained(tmp_path / "saved")
    tiny_model("llama", seed=7, width=48).save_pretrained(tmp_path / "newer")
    handed_over = StitchConfig.from_pretrained(tmp_path / "saved")
    handed_over.experts["code"] = handed_over.experts["code"] | {"model": str(tmp_path / "newer")}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)
    expert = loaded.base_model.experts["default"]["code"].model
    assert torch.equal(logits(expert), logits(load(tmp_path, "newer")))

    handed_over.experts["code"] = handed_over.experts["code"] | {"model": str(root / "math")}
    with pytest.raises(ValueError, match=r"'code'.*model_type is 'qwen3', expected 'llama'"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)
