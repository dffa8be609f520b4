"""`model.export(path)` with an output mixture: all models' norms and heads come along, and the same is said."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_bts import StitchConfig
from tests import ROOT
from tests.export.test_export import assert_same, exported, inputs, stitched
from tests.helpers.zoo import ARCHITECTURES, tiny_model


FAST = ["llama", "gpt2", "gemma2", "cohere", "opt"]  # tied heads, soft caps, scales, a projection behind the layers
OPTIONS = [{"num_stitches": 0}, {}, {"pattern": "experts_into_hub", "gate": "token", "r": 2}]


def mixture(arch="llama", options=None, **experts):
    config = StitchConfig(task_type="CAUSAL_LM", output="mixture", init_weights=False, **(options or {}))
    return stitched(arch, config, **experts)


@pytest.mark.parametrize("arch", [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES])
def test_equals_the_adapter_model(arch, tmp_path):
    """Log probabilities, the loss, and the tokens of cached generation, with experts of the hub's kind and another."""
    model = mixture(arch, same=tiny_model(arch, seed=1), other=tiny_model("mistral", seed=2, layers=6, width=48))
    alone = exported(model, tmp_path)
    # One-row gates depend on their alignment in memory, in the last bits.
    assert_same(model, alone, exact=False)
    with torch.no_grad():
        said = alone(**inputs()).logits
        torch.testing.assert_close(said.logsumexp(-1), torch.zeros(said.shape[:2]), atol=1e-5, rtol=0)
        losses = [each(**inputs(), labels=inputs()["input_ids"]).loss for each in (model, alone)]
    torch.testing.assert_close(*losses)
    generate = {**inputs(), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**generate), alone.generate(**generate))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options, tmp_path):
    model = mixture("llama", options, code=tiny_model("llama", seed=1), wide=tiny_model("gpt2", seed=2, width=48))
    assert_same(model, exported(model, tmp_path), exact=False)


def test_padded_vocabularies(tmp_path):
    model = mixture(longer=tiny_model("llama", seed=1, vocab_size=80), shorter=tiny_model("gpt2", seed=2))
    assert_same(model, exported(model, tmp_path), exact=False)


def test_loads_in_a_fresh_process(tmp_path):
    model = mixture()
    model.export(tmp_path / "alone")
    with torch.no_grad():
        torch.save(model(**inputs()).logits, tmp_path / "logits")
    script = f"""
import torch, peft_bts
from transformers import AutoModelForCausalLM
from tests.export.test_export import inputs
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "alone")!r})
with torch.no_grad():
    found = model(**inputs()).logits
torch.testing.assert_close(found, torch.load({str(tmp_path / "logits")!r}), rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_half_precision_keeps_the_gates_in_theirs(tmp_path):
    for seed, name in enumerate(("hub", "code")):
        tiny_model("llama", seed=seed, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    config = StitchConfig(task_type="CAUSAL_LM", output="mixture", num_stitches=0, init_weights=False)
    model = get_peft_model(hub, config).eval()
    model.attach_expert("code", str(tmp_path / "code"))
    alone = exported(model, tmp_path / "alone")
    assert {p.dtype for p in alone.output_mixture.parameters()} == {torch.float32} and alone.dtype == torch.bfloat16
    assert_same(model, alone, exact=False)


def test_active_experts_and_loras(tmp_path):
    """A LoRA expert comes merged, with the hub's head; experts that are left out do not come."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    expert = get_peft_model(tiny_model("llama"), lora)
    model = mixture("llama", {"num_stitches": 0}, lora=expert, code=tiny_model("llama", seed=1))
    assert_same(model, exported(model, tmp_path / "all"), exact=False)
    model.set_active_experts(["lora"])
    alone = exported(model, tmp_path / "one")
    assert_same(model, alone, exact=False)
    assert alone.output_mixture.experts == ["lora"]


def test_trains(tmp_path):
    """The gates of an exported mixture go on training, with the gradients that they had in the adapter."""
    model = mixture("llama", {"num_stitches": 0})
    alone = exported(model, tmp_path)
    for each in (model.train(), alone.train()):
        each(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    ours = {n.rpartition("gate.")[2]: p.grad for n, p in model.named_parameters() if "stitch_output" in n}
    theirs = {n.rpartition("gate.")[2]: p.grad for n, p in alone.named_parameters() if "output_mixture" in n}
    assert ours.keys() == theirs.keys() and all(grad.any() for grad in ours.values())
    for name, grad in ours.items():
        torch.testing.assert_close(theirs[name], grad, rtol=1e-4, atol=1e-6)


def test_the_config_says_how_heads_begin(tmp_path):
    """What a loader needs to know of the modules in front of each head; files without a mixture do not have it."""
    mixture(other=tiny_model("gpt2", seed=1)).export(tmp_path / "mixture")
    stitched("llama").export(tmp_path / "hub")
    assert AutoConfig.from_pretrained(tmp_path / "mixture").final_modules == {"hub": ["norm"], "other": ["ln_f"]}
    assert AutoConfig.from_pretrained(tmp_path / "hub").final_modules is None
