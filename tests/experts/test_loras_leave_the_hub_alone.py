"""Attaching a LoRA that shares the hub's weights never changes them: what would is refused, and nothing is left."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.models import IDS, logits
from tests.helpers.zoo import tiny_model


def trained(folder, arch="llama", **options):
    """A hub and a LoRA of it, saved; what PEFT trains is not what it was."""
    tiny_model(arch).save_pretrained(folder / "hub")
    options = {"target_modules": "all-linear", **options}
    model = get_peft_model(plain(folder), LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "lora")
    return folder / "lora"


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=torch.float32).eval()


def attach(folder, lora, refusal=None):
    """Attach it, or be refused; the hub is as it was."""
    hub = plain(folder)
    before, weights = logits(hub), {name: p.clone() for name, p in hub.named_parameters()}
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", num_stitches=2)).eval()
    if refusal is None:
        model.attach_expert("law", str(lora))
    else:
        with pytest.raises(ValueError, match=refusal):
            model.attach_expert("law", str(lora))
        assert not model.peft_config["default"].experts
    model.unload()
    assert torch.equal(logits(hub), before)
    assert all(torch.equal(p, weights[name]) for name, p in hub.named_parameters())
    return hub


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base(init, tmp_path):
    attach(tmp_path, trained(tmp_path, init_lora_weights=init), f"init_lora_weights='{init}' changes the weights")


@pytest.mark.parametrize("arch, bias", [("gpt2", "all"), ("qwen2", "lora_only")])
def test_trained_biases(arch, bias, tmp_path):
    attach(tmp_path, trained(tmp_path, arch, bias=bias), "has a value of its own for .*bias")


@pytest.mark.parametrize("key", ["mlp.up_proj.weight", "self_attn.q_proj.base_layer.weight"])
def test_files_with_weights_of_the_hub(key, tmp_path):
    lora = trained(tmp_path, target_modules=["q_proj"])
    tensors = load_file(lora / "adapter_model.safetensors")
    shape = plain(tmp_path).get_submodule("model.layers.0").get_parameter(key.replace(".base_layer", "")).shape
    tensors[f"base_model.model.model.layers.0.{key}"] = torch.zeros(shape)
    save_file(tensors, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    attach(tmp_path, lora, "has a value of its own for model.layers.0")


HARMLESS = [
    {},
    {"init_lora_weights": "gaussian"},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
]


@pytest.mark.parametrize("options", HARMLESS, ids=str)
def test_others_attach(options, tmp_path):
    attach(tmp_path, trained(tmp_path, **options))


def test_on_a_model_of_its_own(tmp_path):
    """The way out that the error names."""
    lora, hub = trained(tmp_path, init_lora_weights="pissa"), plain(tmp_path)
    before = logits(hub)
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", num_stitches=2)).eval()
    model.attach_expert("law", {"model": str(tmp_path / "hub"), "adapter": str(lora)})
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)
