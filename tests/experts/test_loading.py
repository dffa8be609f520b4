"""From a reference to an expert: what is loaded is what transformers and PEFT load, frozen, in the hub's dtype.

Expected are models that were loaded without this package, and standalone PEFT models of their own seed.
"""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)

from tests.helpers.bad_input import refused
from tests.helpers.checkpoints import load, make, save, state
from tests.helpers.models import IDS, logits
from tests.helpers.zoo import tiny_model


def expert_of(model, name):
    return model.base_model.experts["default"][name].model


def weights(model):
    """All parameters and buffers, each once, by their place in memory."""
    return {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}


def size(weights):
    return sum(tensor.numel() for tensor in weights.values())


# --------------------------------------------------------------------------------------------------------- full models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype(root, tmp_path, stored, dtype):
    """Whatever a checkpoint was stored in, its expert is of the hub's dtype; it is frozen, and without dropout."""
    source = tiny_model("gpt2", seed=4, layers=3, resid_pdrop=0.5).to(stored)
    source.save_pretrained(tmp_path)
    model = make(root, "", dtype=dtype, autocast_adapter_dtype=False).train()
    model.attach_expert("new", str(tmp_path))
    expert = expert_of(model, "new")
    assert {tensor.dtype for tensor in expert.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in expert.parameters())
    assert not any(module.training for module in expert.modules())
    assert torch.equal(logits(expert), logits(source.to(dtype)))


@pytest.mark.parametrize("name", ["math", "lora"])
def test_subfolders(root, name):
    """A folder, or a repository, may hold several models and adapters."""
    model = make(root, "")
    model.attach_expert("a", {"adapter" if name == "lora" else "model": str(root), "subfolder": name})
    model.attach_expert("b", str(root), subfolder=name)
    expected = load(root, "math") if name == "math" else PeftModel.from_pretrained(load(root, "seed"), root / "lora")
    for expert in "ab":
        assert torch.equal(logits(expert_of(model, expert)), logits(expected))
        assert model.peft_config["default"].experts[expert]["subfolder"] == name
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(save(model, root))), logits(model))


def test_where_an_object_came_from(root):
    """What an object was loaded from is noted; any other, made or changed in memory, has no place to be found."""
    model = make(root, "")
    model.attach_expert("loaded", load(root, "math"))
    model.attach_expert("made", tiny_model("llama", seed=5))
    model.attach_expert("tuned", PeftModel.from_pretrained(load(root, "seed"), root / "lora"))  # changed in memory
    experts = model.peft_config["default"].experts
    places = {name: reference["model"] for name, reference in experts.items()}
    assert places == {"loaded": str(root / "math"), "made": None, "tuned": None}
    assert not any(reference.get("adapter") for reference in experts.values())
    folder = save(model, root)
    with pytest.raises(ValueError, match=r"Expert '(made|tuned)' has no reference"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- adapters of the hub

ATTENTION, MLP = ["q_proj", "v_proj"], ["down_proj"]
ADAPTERS = {
    "lora": LoraConfig(target_modules=ATTENTION, r=2),
    "rslora": LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=16, use_rslora=True),
    "dora": LoraConfig(target_modules=ATTENTION, r=2, use_dora=True),
    "embeddings": LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2),
    "parameters": LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"], r=2),
    "ia3": IA3Config(target_modules=ATTENTION + MLP, feedforward_modules=MLP),
    "loha": LoHaConfig(target_modules=ATTENTION, r=2),
    "lokr": LoKrConfig(target_modules=ATTENTION, r=2),
    "oft": OFTConfig(target_modules=ATTENTION, oft_block_size=4),
    "vera": VeraConfig(target_modules=["q_proj"], r=4),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, root):
    """The folder of an adapter of the seed, all of whose weights matter."""
    folder = root / "adapters" / request.param
    model = get_peft_model(load(root, "seed"), copy.deepcopy(ADAPTERS[request.param]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_adapters_of_every_kind(root, adapter):
    """Not only LoRA: by path they equal the standalone model, cost their own weights only, and leave the hub alone."""
    alone = PeftModel.from_pretrained(load(root, "seed"), adapter)
    model = make(root, "code")
    hub, before = model.get_base_model(), state(model)
    model.attach_expert("new", str(adapter))
    expert = expert_of(model, "new")
    assert torch.equal(logits(expert), logits(alone)) and not torch.equal(logits(expert), logits(load(root, "seed")))
    shared = weights(hub)
    own = {place: tensor for place, tensor in weights(expert).items() if place not in shared}
    assert size(own) == size(weights(alone)) - size(weights(load(root, "seed"))) > 0
    after = state(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(root, "seed")))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(save(model, root))), logits(model))


@pytest.mark.parametrize("kind", ["prefix", "stitch"])
def test_adapters_that_are_no_models(root, tmp_path, kind):
    """A soft prompt, or stitches, beside a model of their own: refused like those of the hub, before any weight."""
    if kind == "stitch":
        make(root, "law").save_pretrained(tmp_path)
    else:
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(load(root, "seed"), prefix).save_pretrained(tmp_path)
    for weights_file in tmp_path.glob("adapter_model.*"):
        weights_file.unlink()
    model = make(root, "code").eval()
    for reference in ({"adapter": str(tmp_path)}, {"model": str(root / "seed"), "adapter": str(tmp_path)}):
        with refused(model, match=rf"(?s)'new'.*{tmp_path}.*{kind.upper()}.*cannot be experts.*LoRA-like"):
            model.attach_expert("new", reference)


def test_a_lora_of_another_model(root, tmp_path):
    """With `model` named beside `adapter`, nothing of the hub is shared."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    alone = get_peft_model(load(root, "code"), lora)
    alone.save_pretrained(tmp_path)
    model = make(root, "code")
    reference = {"model": str(root / "code"), "adapter": str(tmp_path)}
    model.attach_expert("new", reference)
    expert = expert_of(model, "new")
    assert torch.equal(logits(expert), logits(alone))
    for other in (model.get_base_model(), expert_of(model, "code")):
        assert not weights(expert).keys() & weights(other).keys()
    kept = {key: value for key, value in model.peft_config["default"].experts["new"].items() if key in reference}
    assert kept == reference
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(save(model, root))), logits(model))


# ----------------------------------------------------------------------------------------- weights shared with the hub


def test_shared_weights_follow_the_hub(root):
    """They are the hub's very own: what changes them there, changes them here, even a move to another dtype."""
    model = make(root, "lora")
    hub, expert, alone = model.get_base_model(), expert_of(model, "lora"), load(root, "seed")
    with torch.no_grad():
        for changed in (hub.model.layers[2], alone.model.layers[2]):
            changed.mlp.down_proj.weight.mul_(3)
    alone = PeftModel.from_pretrained(alone, root / "lora")
    assert torch.equal(logits(expert), logits(alone))
    model.to(torch.bfloat16)
    assert torch.equal(logits(expert), logits(alone.to(torch.bfloat16)))


def test_hooks_of_the_hub_are_the_hubs(root):
    """A probe on the hub sees the hub, not an expert of its weights, whether it was there first or came later."""
    hub, calls = load(root, "seed"), []
    layers = [hub.model.layers[0].mlp, hub.model.layers[3], hub.lm_head, hub.model]
    model = get_peft_model(hub, make(root, "").peft_config["default"])
    for layer in layers[::2]:
        layer.register_forward_hook(lambda *_: calls.append("hub"))
        layer.register_forward_pre_hook(lambda *_: calls.append("hub"))
    model.attach_expert("lora", str(root / "lora"))
    calls.clear()  # attaching tries things out
    for layer in layers[1::2]:
        layer.register_forward_hook(lambda *_: calls.append("hub"))
        layer.register_forward_pre_hook(lambda *_: calls.append("hub"))
    expert = expert_of(model, "lora")
    logits(expert)
    assert not calls
    model(input_ids=IDS)
    assert len(calls) == 8


def test_an_expert_of_the_hub_has_no_stitches(root):
    """What is shared is the seed as it was: no stitched layers, nor the head that the adapter trains."""
    model = make(root, "code", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.zero_()
    model.attach_expert("lora", str(root / "lora"))
    expert = expert_of(model, "lora")
    assert not [name for name, _ in expert.named_modules() if "stitch" in name or "modules_to_save" in name]
    assert torch.equal(logits(expert), logits(PeftModel.from_pretrained(load(root, "seed"), root / "lora")))
