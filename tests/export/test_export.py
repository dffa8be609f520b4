"""`model.export(path)`: a whole composition as one checkpoint, loaded by the Auto classes alone."""

import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    StaticCache,
)

from peft_bts import StitchConfig, StitchExportForCausalLM, StitchExportModel
from peft_bts.install import how_to_install
from tests.helpers.zoo import ARCHITECTURES, tiny_model


# Chosen for what can differ: kinds of attention and positions, tied heads, soft-capping and scaling behind the head,
# mixture-of-experts layers, linear attention, layers that return tuples.
CHOSEN = ["llama", "gpt2", "gemma2", "gemma3_text", "bloom", "opt", "cohere", "gpt_oss", "mpt", "qwen3_next", "gptj"]


def inputs(padded=True):
    torch.manual_seed(0)
    ids = torch.randint(2, 64, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stitched(arch, config=None, **experts):
    hub = tiny_model(arch)
    # Reloaded models choose their MoE kernel anew; so does the model that they are compared with.
    hub.config._experts_implementation = None
    model = get_peft_model(hub, config or StitchConfig(task_type="CAUSAL_LM", output="hub", init_weights=False))
    for name, expert in (experts or {"b": tiny_model("mistral", seed=2, layers=6, width=48)}).items():
        model.attach_expert(name, expert)
    return model.eval()


def exported(model, path, **kwargs):
    model.export(path)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


@torch.no_grad()
def assert_same(one, other, exact=True, **kwargs):
    expected, found = one(**inputs(), **kwargs).logits, other(**inputs(), **kwargs).logits
    if exact:
        assert torch.equal(expected, found)
    else:
        torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arch", [a if a in CHOSEN else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_equals_the_adapter_model(arch, tmp_path):
    """Logits bit for bit, and the tokens of cached generation, with an expert of another kind, depth and width."""
    model = stitched(arch, same=tiny_model(arch, seed=1), other=tiny_model("mistral", seed=2, layers=6, width=48))
    alone = exported(model, tmp_path)
    is_moe = hasattr(alone.config.part("hub"), "num_experts_per_tok") or arch in ("qwen3_next",)
    assert_same(model, alone, exact=not is_moe)  # the zoo's MoE kernel setting is not part of a checkpoint
    generate = {**inputs(), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**generate)
    assert torch.equal(expected, alone.generate(**generate))
    assert torch.equal(expected, alone.generate(**generate, use_cache=False))
    if arch != "gpt_neo":  # its own static cache differs from its dynamic one, stitched or not
        assert torch.equal(expected, alone.generate(**generate, cache_implementation="static", disable_compile=True))
    assert torch.equal(model.generate(**generate, num_beams=2), alone.generate(**generate, num_beams=2))


def test_the_card(tmp_path):
    """It begins with what transformers' own error does not say; it runs, and is not written over."""
    model = stitched("llama")
    model.export(tmp_path)
    path = tmp_path / "README.md"
    card = path.read_text()
    assert "import peft_bts" in card.partition("# A stitched model\n")[2].strip().splitlines()[0]
    assert how_to_install() in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found = {}
    exec(snippet.replace("path or id of this model", str(tmp_path)), found)
    assert_same(model, found["model"].eval())
    path.write_text("My own words.")
    model.export(tmp_path)
    assert path.read_text() == "My own words."


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "experts_into_hub"},
        {"gate": "token"},
        {"expert_streams": "projected", "r": 2},
        {"num_stitches": 1, "gate_bias": False},
    ],
    ids=str,
)
def test_equals_the_adapter_model_with_every_option(options, tmp_path):
    model = stitched(
        "llama",
        StitchConfig(task_type="CAUSAL_LM", output="hub", init_weights=False, **options),
        code=tiny_model("llama", seed=1),
    )
    # Products with one-row weights depend on the weights' alignment in memory, which a loaded file decides.
    assert_same(model, exported(model, tmp_path), exact=options.get("gate") != "token")


def test_half_precision_keeps_the_stitches_in_theirs(tmp_path):
    """A bf16 hub has float32 stitches; a reload in bf16 must not round them."""
    for seed, name in enumerate(("hub", "code")):
        tiny_model("llama", seed=seed, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", output="hub", init_weights=False)).eval()
    model.attach_expert("code", str(tmp_path / "code"))
    alone = exported(model, tmp_path / "alone")
    assert alone.dtype == torch.bfloat16
    assert {p.dtype for p in alone.model.stitches.parameters()} == {torch.float32}
    assert_same(model, alone)


def test_loads_in_a_fresh_process(tmp_path):
    model = stitched("llama")
    model.export(tmp_path / "alone")
    with torch.no_grad():
        torch.save(model(**inputs()).logits, tmp_path / "logits")
    script = f"""
import torch, peft_bts
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)  # as here: the number of threads decides the order of sums
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "alone")!r})
torch.manual_seed(0)
ids = torch.randint(2, 64, (2, 9)); mask = torch.ones_like(ids); mask[0, :3] = 0
with torch.no_grad():
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, torch.load({str(tmp_path / "logits")!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_only_active_experts_are_exported(tmp_path):
    model = stitched("llama", a=tiny_model("llama", seed=1), b=tiny_model("gpt2", seed=2))
    with model.set_active_experts(["b"]):
        alone = exported(model, tmp_path)
        assert_same(model, alone)
    assert alone.config.names == ["hub", "b"]


def test_lora_experts_are_merged(tmp_path):
    """A LoRA is not part of the format: its expert becomes a plain model, equal up to rounding."""
    lora = get_peft_model(tiny_model("llama"), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    model = stitched("llama", law=lora)
    assert_same(model, exported(model, tmp_path), exact=False)


def test_trained_modules_and_tokenizer_come_along(tmp_path):
    from tokenizers import Tokenizer, models

    hub = tiny_model("llama")
    hub.save_pretrained(tmp_path / "hub")
    vocabulary = {f"t{i}": i for i in range(64)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))).save_pretrained(
        tmp_path / "hub"
    )
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    model = get_peft_model(
        hub, StitchConfig(task_type="CAUSAL_LM", output="hub", init_weights=False, modules_to_save=["lm_head"])
    ).eval()
    model.attach_expert("code", tiny_model("llama", seed=1))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert_same(model, exported(model, tmp_path / "alone"))
    assert AutoTokenizer.from_pretrained(tmp_path / "alone").get_vocab() == vocabulary


def test_shape_for_serving_engines(tmp_path):
    """What Transformers backends of serving engines rely on."""
    model = stitched("llama", a=tiny_model("llama", seed=1, layers=3), b=tiny_model("qwen3", seed=2))
    alone = exported(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, StitchExportModel) and isinstance(alone, StitchExportForCausalLM)
    assert config.num_hidden_layers == 4 + 3 + 4 == len(base.layers) == len(config.layer_types)
    assert base.is_backend_compatible() if hasattr(base, "is_backend_compatible") else base._supports_attention_backend
    indices = [module.layer_idx for layer in base.layers for module in layer.modules() if hasattr(module, "layer_idx")]
    assert indices == list(range(11))
    assert torch.equal(alone.model(**inputs())[0], base(**inputs())[0])  # the stitches are in the base model


def test_exchanged_modules_take_part_once_connected(tmp_path):
    """Engines put their own modules into the models; `connect` makes the forward anew from what is there."""
    base = exported(stitched("llama", a=tiny_model("llama", seed=1, layers=3)), tmp_path).model
    with torch.no_grad():
        before = base(**inputs())[0]
        for backbone in base.backbones.values():
            other = torch.nn.Embedding.from_pretrained(2 * backbone.get_input_embeddings().weight)
            backbone.set_input_embeddings(other)
        base.connect()
        after = base(**inputs())[0]
        for backbone in base.backbones.values():
            backbone.get_input_embeddings().weight.mul_(0.5)
        assert not torch.equal(before, after) and torch.equal(before, base(**inputs())[0])


def test_attention_goes_through_the_attention_interface(tmp_path):
    """A serving engine hands its own attention in by name, with kwargs that must reach every layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = stitched("llama", a=tiny_model("llama", seed=1, layers=3))
    model.export(tmp_path)
    seen = []

    def attention(module, query, key, value, mask, instances=None, **kwargs):
        seen.append(instances[module.layer_idx])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recording", attention)
    base = AutoModel.from_pretrained(tmp_path, attn_implementation="recording")
    positions = torch.arange(9)[None]
    base(
        input_ids=inputs()["input_ids"],
        use_cache=False,
        position_ids=positions,
        instances={i: f"layer {i}" for i in range(7)},
        return_dict=False,
    )
    assert sorted(seen) == [f"layer {i}" for i in range(7)]


def test_static_cache_compiles_without_a_graph_break(tmp_path):
    model = stitched("llama", a=tiny_model("llama", seed=1))
    alone = exported(model, tmp_path)
    cache = StaticCache(config=alone.config, max_cache_len=16)
    ids = inputs(padded=False)["input_ids"]
    with torch.no_grad():
        alone(input_ids=ids[:, :8], past_key_values=cache, position_ids=torch.arange(8)[None])
        compiled = torch.compile(alone, fullgraph=True, backend="aot_eager")
        step = compiled(input_ids=ids[:, 8:], past_key_values=cache, position_ids=torch.tensor([[8]]))
        torch.testing.assert_close(step.logits[:, -1], alone(input_ids=ids).logits[:, -1])


def test_trains(tmp_path):
    """The standalone model is a model like any other: a loss, gradients for all of its weights."""
    alone = exported(stitched("llama"), tmp_path).train()
    batch = inputs(padded=False)
    alone(**batch, labels=batch["input_ids"]).loss.backward()
    missing = [name for name, p in alone.named_parameters() if p.grad is None]
    assert all("norm" in name and "backbones.for_b" in name for name in missing), (
        missing
    )  # experts' heads are not there


def test_quantised_models_are_refused(tmp_path):
    model = stitched("llama")
    model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="'hub' is quantised"):
        model.export(tmp_path)
