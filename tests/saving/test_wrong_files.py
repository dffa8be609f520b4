"""Files, configs and hubs that do not belong together: every mistake is named, and nothing is half loaded."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_bts import StitchLayer
from tests.helpers.bad_input import config, every_load_refused, load, refused
from tests.helpers.models import fresh, logits, pristine, randomize


KEY = "base_model.model.model.layers.{}.stitch_layer.{}"


def drop(tensors):
    del tensors[KEY.format(1, "gate.code.weight")]


def drop_an_expert(tensors):
    for key in [key for key in tensors if ".math." in key]:
        del tensors[key]


def add_an_expert(tensors):
    tensors[KEY.format(3, "gate.law.weight")] = torch.zeros(32, 32)


def add_a_layer(tensors):
    tensors[KEY.format(2, "gate.code.weight")] = torch.zeros(32, 32)


def add_nonsense(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32)


def reshape(tensors):
    tensors[KEY.format(3, "gate.hub.weight")] = torch.zeros(1, 32)


def empty(tensors):
    tensors.clear()
    tensors["nothing"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop, r"missing: .*layers\.1\.stitch_layer\.gate\.code\.weight"),
        (drop_an_expert, r"missing: .*\.math\."),
        (add_an_expert, r"not part of this adapter: .*layers\.3\.stitch_layer\.gate\.law\.weight"),
        (add_a_layer, r"not part of this adapter: .*layers\.2\.stitch_layer\.gate\.code\.weight"),
        (add_nonsense, r"not part of this adapter: .*layers\.0\.mlp\.up_proj\.weight"),
        (reshape, r"layers\.3\.stitch_layer\.gate\.hub\.weight has shape \(1, 32\), expected \(32, 32\)"),
        (empty, r"missing: .*\(?"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_do_not_fit(adapter, edit, match):
    """Every tensor that is missing, extra or misshapen is named; nothing is half loaded."""
    file = adapter / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = dict(tensors)
    edit(wrong)
    match = rf"(?s)do not fit stitch adapter.*{match}.*nothing was loaded"

    untouched = load(adapter)
    with refused(untouched, match=match):  # nobody has run it yet, it is no less the user's
        set_peft_model_state_dict(untouched, wrong)
    other = randomize(load(adapter), seed=1)
    other_before = logits(other)
    with refused(other, match=match):
        set_peft_model_state_dict(other, wrong)
    assert torch.equal(logits(other), other_before)

    save_file(wrong, file)
    with every_load_refused(adapter, match):
        save_file(tensors, file)


def test_a_failed_load_keeps_a_model_that_was_never_run(adapter):
    """Weights that do not fit a model just made are refused; the model stays stitched."""
    model = load(adapter)
    with pytest.raises(ValueError, match="do not fit"):
        set_peft_model_state_dict(model, {"nothing": torch.zeros(1)})
    assert torch.equal(logits(model), torch.load(adapter / "logits.pt"))

    hub = AutoModelForCausalLM.from_pretrained(adapter / "hub")
    model = get_peft_model(hub, config(experts={"code": str(adapter / "code")}))
    with pytest.raises(ValueError, match="do not fit"):
        set_peft_model_state_dict(model, {"nothing": torch.zeros(1)})
    assert [name for name, module in model.named_modules() if isinstance(module, StitchLayer)]
    assert not torch.equal(logits(model), logits(pristine("llama")))


def test_a_failed_load_leaves_the_hub_trainable(adapter):
    """A hub on which an adapter could not be loaded is what it was, its weights not frozen."""
    hub = AutoModelForCausalLM.from_pretrained(adapter / "hub")
    path = adapter / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": "token"}))
    with refused(hub, match="do not fit stitch adapter"):
        PeftModel.from_pretrained(hub, adapter / "adapter")


@pytest.mark.parametrize(
    "options",
    [{"num_stitches": 4}, {"gate": "token"}, {"gate_bias": False}, {"r": 4}, {"layers_to_stitch": [0, 3]}],
    ids=str,
)
def test_config_of_another_adapter(adapter, options):
    """A config and a file that do not belong together."""
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | options))
    with every_load_refused(adapter, "do not fit stitch adapter"):
        path.write_text(text)


@pytest.mark.parametrize(
    ("hub", "match"),
    [
        ({"width": 48}, r"gate\.hub\.weight has shape \(32, 32\), expected \(48, 48\)"),
        ({"layers": 6}, r"missing: .*layers\.2\.stitch_layer"),
        ({"layers": 1}, r"num_stitches=2 does not fit a hub of 1 layers"),
        ({"arch": "gpt2"}, r"missing: .*transformer\.h\.1\.stitch_layer"),
    ],
    ids=str,
)
def test_another_hub(adapter, hub, match):
    """An adapter on a hub of other depth, width or architecture than its own."""
    hub = fresh(**({"arch": "llama"} | hub))
    with refused(hub, match=rf"(?s){match}", flags=False):
        PeftModel.from_pretrained(hub, adapter / "adapter")
