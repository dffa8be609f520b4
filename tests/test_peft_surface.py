"""What a LoRA user expects from PEFT must hold for stitches, and experts must come and go without a trace."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from zoo import tiny_model

from peft_bts import StitchConfig, StitchLayer


torch.set_num_threads(1)

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
LAST = "base_model.model.model.layers.3.stitch_layer"
FIRST = "base_model.model.model.layers.1.stitch_layer"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed, three experts of other shapes, and a LoRA of the seed, on disk."""
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(root / "seed")
    tiny_model("llama", seed=1).save_pretrained(root / "code")
    tiny_model("qwen3", seed=2, layers=6, width=48).save_pretrained(root / "math")
    tiny_model("gpt2", seed=3, layers=3).save_pretrained(root / "law")
    make_lora(root, "lora")
    return root


def make_lora(root, name, **options):
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "mlp.up_proj"], **options
    )
    model = get_peft_model(load(root, "seed"), lora)
    if options.get("modules_to_save"):
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.5)
    model.save_pretrained(root / name)


def load(root, name, **kwargs):
    return AutoModelForCausalLM.from_pretrained(root / name, **kwargs)


def config(root=None, experts="code math", **options):
    """Two stitches of random weights: Hub-into-Experts behind layer 1, Experts-into-Hub behind layer 3."""
    options = {"num_stitches": 2, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    return StitchConfig(experts={name: str(root / name) for name in experts.split()}, **options)


def make(root, experts="code math", *, autocast_adapter_dtype=True, adapter_name="default", dtype="auto", **options):
    torch.manual_seed(0)
    return get_peft_model(
        load(root, "seed", dtype=dtype),
        config(root, experts, **options),
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def two_adapters(root, first="default", second="other"):
    """Other experts, another schedule and another gate in the second adapter; `code` is in both."""
    model = make(root, adapter_name=first)
    model.add_adapter(second, config(root, "code law", num_stitches=1, layers_to_stitch=[0, 2, 3], gate="token"))
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def train(model, steps=2):
    """A few steps on every weight that asks for a gradient; all of them must move."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert before and not still
    return model


def state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert not different


def assert_untouched(hub):
    """No wrapper, no hook, nothing of PEFT's is left in a hub."""
    assert not [name for name, module in hub.named_modules() if isinstance(module, StitchLayer)]
    assert not [name for name, m in hub.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [key for key in hub.state_dict() if "stitch" in key]


def stitches(model, adapter="default"):
    return [p for name, p in model.named_parameters() if f".stitch_layer.{adapter}." in name]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------ counts and status


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


def save(model, root, name="saved", **kwargs):
    folder = root / f"{name}-{len(list(root.iterdir()))}"
    model.save_pretrained(folder, **kwargs)
    return folder


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


# --------------------------------------------------------------------------------------------------- save and load


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


# ------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize(
    "first, second",
    [("default", "other"), ("test-adapter", "other"), ("a", "ab"), ("ab", "a"), ("code", "math"), ("law", "lora")],
)
def test_two_adapters_are_two_models(root, first, second):
    """Adapters of any two names do on one hub what they do alone, and are saved and loaded without mix-up."""
    model = two_adapters(root, first, second)
    folder = save(model, root)
    results = {}
    for name in (first, second, first):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(load(root, "seed"), folder / name if name != "default" else folder)
        assert torch.equal(logits(model), logits(alone))
        results[name] = logits(model)
    assert not torch.equal(*results.values())

    reloaded = PeftModel.from_pretrained(load(root, "seed"), folder / second, adapter_name=second)
    reloaded.load_adapter(folder / first if first != "default" else folder, first)
    for name, expected in results.items():
        reloaded.set_adapter(name)
        assert torch.equal(logits(reloaded), expected)


@pytest.mark.parametrize("name", ["1", "3", "weight", "bias", "for_code", "hub", "gate", "model", "layers", "experts"])
def test_no_adapter_name_costs_weights(root, name):
    """PEFT drops keys by substring when it saves: such names are refused, or both adapters survive; never silence."""
    model = make(root)
    expected = logits(model)
    try:
        model.add_adapter(name, config(root, "code law"))
    except ValueError as error:
        assert repr(name) in str(error)
        assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]
        return
    folder = save(model, root)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder)), expected)
    model.set_adapter(name)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder / name)), logits(model))


def test_training_one_adapter_leaves_the_other(root):
    """A second adapter must not be trained along, nor lose its trainability for good."""
    model = two_adapters(root)
    before = state(model)
    model.set_adapter("other")
    assert trainable(model) == {name for name in before if ".stitch_layer.other." in name}
    train(model)
    model.set_adapter("default")
    after = state(model)
    assert_same(
        {k: v for k, v in after.items() if ".other." not in k}, {k: v for k, v in before.items() if ".other." not in k}
    )
    assert trainable(model) == {name for name in before if ".stitch_layer.default." in name}


@pytest.mark.parametrize("deleted", ["default", "other"])
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_delete_adapter(root, deleted, active):
    """Deleting an adapter, the active one too, leaves the other as if it had been alone all along."""
    model = two_adapters(root)
    kept = "other" if deleted == "default" else "default"
    model.set_adapter(kept)
    expected = logits(model)
    model.set_adapter(active)
    model.delete_adapter(deleted)
    assert list(model.peft_config) == model.active_adapters == [kept]
    assert torch.equal(logits(model), expected)
    status = model.get_model_status()
    assert status.available_adapters == [kept] and status.num_adapter_layers == (2 if kept == "default" else 3)
    assert not [name for name in model.state_dict() if f".{deleted}." in name]
    assert list(model.base_model.experts.keys()) == [kept]


def test_delete_the_last_adapter(root):
    """The hub is bitwise what it was, without a hook; and can be stitched again."""
    seed = load(root, "seed")
    expected, before = logits(seed), state(seed)
    torch.manual_seed(0)
    model = get_peft_model(seed, config(root))
    stitched = logits(model)
    model.delete_adapter("default")
    assert_untouched(seed)
    assert_same(state(seed), before)
    assert torch.equal(logits(seed), expected)
    torch.manual_seed(0)
    model.add_adapter("again", config(root))
    model.set_adapter("again")
    assert torch.equal(logits(model), stitched)


@pytest.mark.parametrize("experts", ["code math", "lora"])
def test_disable_adapter_is_the_seed(root, experts):
    """Needed to compare with the seed (and by DPO as the reference model): bitwise, nested, and after errors."""
    seed = logits(load(root, "seed"))
    model = make(root, experts)
    stitched = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), seed)
        with model.disable_adapter():
            assert torch.equal(logits(model), seed)
        assert torch.equal(logits(model), seed)
    assert torch.equal(logits(model), stitched) and not torch.equal(stitched, seed)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _ = 1 / 0
    assert torch.equal(logits(model), stitched)
    assert len(trainable(model)) == len(stitches(model))


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"], ["down_proj"]], ids=str)
def test_the_seed_is_given_back(root, end, modules_to_save):
    """The very object, bitwise, without a hook, and ready to be stitched again."""
    seed = load(root, "seed")
    expected, before = logits(seed), state(seed)
    options = {"modules_to_save": modules_to_save}
    torch.manual_seed(0)
    model = get_peft_model(seed, config(root, **options))
    stitched = logits(model)
    train(model)
    if end == "unload":
        assert model.unload() is seed
    else:
        model.delete_adapter("default")
    assert_untouched(seed)
    assert_same(state(seed), before)
    assert torch.equal(logits(seed), expected)
    torch.manual_seed(0)
    assert torch.equal(logits(get_peft_model(seed, config(root, **options))), stitched)


def test_a_config_belongs_to_its_caller(root):
    """One config object may serve hubs of other depths and several adapters; attach and detach do not edit it."""
    shared = config(root)
    experts = copy.deepcopy(shared.experts)
    first = get_peft_model(load(root, "seed"), shared)
    second = get_peft_model(load(root, "law"), shared)
    first.add_adapter("twin", shared)
    before = copy.deepcopy(shared.to_dict())
    for model, layers in [(first, ["1", "3"]), (second, ["0", "2"])]:
        model.attach_expert("extra", load(root, "code"))
        model.detach_expert("math")
        wrapped = [status.name.rpartition(".")[2] for status in model.get_layer_status()]
        assert wrapped == layers
        logits(model)
    assert shared.to_dict() == before and shared.experts == experts
    first.set_adapter("twin")
    assert sorted(first.peft_config["twin"].experts) == ["code", "math"]
    assert sorted(first.peft_config["default"].experts) == ["code", "extra"]
    logits(first)


def test_an_expert_of_two_adapters_is_loaded_once(root):
    """Experts are the memory; a second adapter of the same reference must cost its stitches only."""
    model = two_adapters(root)
    experts = model.base_model.experts
    assert experts["default"]["code"].model is experts["other"]["code"].model
    model.load_adapter(save(make(root), root), "third")
    assert experts["third"]["math"].model is experts["default"]["math"].model
    model.set_adapter("third")
    expected = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    assert not [name for name in trainable(model) if "stitch_layer" not in name]


def test_an_adapter_made_from_anothers_config_has_its_experts(root):
    """As TRL's DPOTrainer makes its reference: experts in memory are shared, also those that came from no path."""
    model = make(root, "code")
    for name, expert in (("object", tiny_model("llama", seed=5)), ("law", load(root, "law")), ("lora", root / "lora")):
        model.attach_expert(name, expert)
    model.add_adapter("ref", model.peft_config["default"])
    experts = model.base_model.experts
    assert all(experts["ref"][name] is experts["default"][name] for name in ("code", "object", "law", "lora"))
    assert model.peft_config["ref"].experts == model.peft_config["default"].experts
    for name, parameter in model.named_parameters():
        if ".stitch_layer.default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.detach_expert("object")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_an_object_attached_to_two_adapters_stays_frozen_until_both_let_go(root):
    """Else detaching from one adapter would silently unfreeze the other's expert."""
    model = make(root)
    model.add_adapter("other", config(root, "code"))
    law = load(root, "law").train()
    for name in ("default", "other"):
        model.set_adapter(name)
        model.attach_expert("law", law)
    assert model.detach_expert("law") is law
    assert not law.training and not any(p.requires_grad for p in law.parameters())
    model.set_adapter("default")
    assert model.detach_expert("law") is law
    assert law.training and all(p.requires_grad for p in law.parameters())


# ------------------------------------------------------------------------------------------- copies, dtypes, Trainer


def clone_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def clone_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_torch])
def test_copies_are_equal_and_independent(root, clone):
    """deepcopy (EMA, DPO) and torch.save of a whole model: a copy must not run on the original's weights or hooks."""
    model = make(root, "code math lora")
    expected = logits(model)
    twin = clone(model)
    assert torch.equal(logits(twin), expected)
    own, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (model, twin))
    assert not own & theirs
    hub = {p.data_ptr() for p in twin.get_base_model().parameters()}
    lora = twin.base_model.experts["default"]["lora"].model
    assert all(p.data_ptr() in hub for name, p in lora.named_parameters() if "lora_" not in name)

    train(twin).detach_expert("math")
    assert torch.equal(logits(model), expected)
    changed = logits(twin)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), changed) and not torch.equal(changed, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_casts_everything(root, dtype):
    """`.to(dtype)` and `.half()` reach hub, stitches and experts, and equal a model that was built in that dtype."""
    seed = load(root, "seed")
    model = get_peft_model(seed, config(experts=""))
    model.attach_expert("math", load(root, "math"))
    model.attach_expert("lora", str(root / "lora"))
    cast = model.half() if dtype == torch.float16 else model.to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    hub = {p.data_ptr() for p in seed.parameters()}
    lora = model.base_model.experts["default"]["lora"].model
    assert all(p.data_ptr() in hub for name, p in lora.named_parameters() if "lora_" not in name)

    lora = PeftModel.from_pretrained(load(root, "seed"), root / "lora").to(dtype)
    built = get_peft_model(load(root, "seed").to(dtype), config(experts=""), autocast_adapter_dtype=False)
    built.attach_expert("math", load(root, "math").to(dtype))
    built.attach_expert("lora", lora)
    built.load_state_dict(cast.state_dict())
    assert logits(cast).dtype == dtype and torch.equal(logits(cast), logits(built))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hubs(root, dtype, autocast):
    """Stitches train in float32 on a half-precision hub unless told otherwise, and reload without losing a bit."""
    model = make(root, "code lora", dtype=dtype, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in stitches(model)} == {torch.float32 if autocast else dtype}
    assert {p.dtype for p in model.base_model.experts["default"]["code"].parameters()} == {dtype}
    assert logits(model).dtype == dtype
    if autocast:
        train(model)
    folder = save(model, root)
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {
        torch.float32 if autocast else dtype
    }
    for options in [{}, {"low_cpu_mem_usage": True}]:
        loaded = PeftModel.from_pretrained(
            load(root, "seed", dtype=dtype), folder, autocast_adapter_dtype=autocast, **options
        )
        assert torch.equal(logits(loaded), logits(model))


def test_modules_to_save_are_trained_saved_and_loaded(root):
    """A user who also trains the head must find it in the file, and the seed's own head unharmed."""
    model = make(root, "code lora", modules_to_save=["lm_head"])
    before = load(root, "seed").lm_head.weight
    train(model)
    head = model.get_base_model().lm_head
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    folder = save(model, root)
    others = [key for key in load_file(folder / "adapter_model.safetensors") if "stitch_layer" not in key]
    assert others == ["base_model.model.lm_head.weight"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load(root, "seed")))
    model.attach_expert("late", str(root / "lora"))  # shares the seed's weights, not the trained head
    alone = PeftModel.from_pretrained(load(root, "seed"), root / "lora")
    assert torch.equal(logits(model.base_model.experts["default"]["late"].model), logits(alone))


@pytest.mark.parametrize("through", ["peft", "auto"])
def test_generate_with_the_cache(root, through):
    """generate() of the PEFT model, cached, gives the tokens of the uncached model."""
    model = make(root)
    if through == "auto":
        model = AutoPeftModelForCausalLM.from_pretrained(save(model, root))
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(input_ids=IDS, **options)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **options), load(root, "seed").generate(IDS, **options))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_through_trainer(root, use_reentrant, tmp_path):
    """Half the activation memory for the same weights, bitwise; and layers are really recomputed."""
    trained, calls = {}, {}
    for checkpointing in (False, True):
        model = make(root, num_stitches=4)
        counted = {
            "hub": model.get_base_model().model.layers[3].mlp,
            "expert": model.base_model.experts["default"]["math"].model.model.layers[-1].mlp,
        }
        calls[checkpointing] = dict.fromkeys(counted, 0)
        for name, layer in counted.items():

            def count(module, args, name=name, calls=calls[checkpointing]):
                calls[name] += 1

            layer.register_forward_pre_hook(count)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            report_to=[],
            save_strategy="no",
            learning_rate=1e-2,
            use_cpu=True,
        )
        Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
        trained[checkpointing] = get_peft_model_state_dict(model)
    assert_same(trained[True], trained[False])
    assert calls == {False: {"hub": 2, "expert": 2}, True: {"hub": 4, "expert": 4}}


# ------------------------------------------------------------------------------------------- experts come and go


def sources(root):
    return {
        "object": load(root, "law"),
        "path": str(root / "law"),
        "pathlike": root / "law",
        "dict": {"model": str(root / "law")},
        "lora": str(root / "lora"),
        "lora_dict": {"adapter": str(root / "lora")},
        "lora_on_model": {"model": str(root / "seed"), "adapter": str(root / "lora")},
    }


SOURCES = ["object", "path", "pathlike", "dict", "lora", "lora_dict", "lora_on_model"]


@pytest.mark.parametrize("trained", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("source", SOURCES)
def test_attach_then_detach_leaves_no_trace(root, source, trained):
    """Trying an expert must be free: logits, weights and config come back bitwise, and only new weights are added."""
    model = make(root)
    if trained:
        train(model)
    before, expected, experts = state(model), logits(model), copy.deepcopy(model.peft_config["default"].experts)
    names = trainable(model)
    model.attach_expert("new", sources(root)[source])
    assert sorted(model.peft_config["default"].experts) == ["code", "math", "new"]
    after = state(model)
    assert_same({key: after[key] for key in before}, before)
    assert not torch.equal(logits(model), expected)
    added = trainable(model) - names
    assert added == {n for n in after if "_layer.default" in n and (".for_new." in n)} and len(added) == 6
    train(model)
    model.load_state_dict(before, strict=False)
    model.detach_expert("new")
    assert_same(state(model), before)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].experts == experts and trainable(model) == names


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "object"])
def test_every_reference_survives_a_save(root, source):
    """An expert attached by reference is found again by whoever loads the adapter."""
    model = make(root)
    model.attach_expert("new", sources(root)[source])
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(save(model, root))), logits(model))


def test_an_expert_that_stays_keeps_its_weights(root):
    """Detaching one of several experts keeps the others' trained weights, bitwise."""
    model = train(make(root, "code math law"))
    before = get_peft_model_state_dict(model)
    kept = {key: tensor.clone() for key, tensor in before.items() if ".math." not in key}
    assert len(kept) == len(before) - 6
    model.detach_expert("math")
    assert_same(get_peft_model_state_dict(model), kept)
    train(model)


def test_a_loaded_model_is_used_as_it_is(root):
    """No copy of billions of weights; detach hands the object back with the flags it came with."""
    model, law = make(root), load(root, "law").train()
    law.transformer.wte.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in law.named_parameters()}
    model.attach_expert("law", law)
    assert model.base_model.experts["default"]["law"].model is law
    assert not law.training and not any(p.requires_grad for p in law.parameters())
    assert model.detach_expert("law") is law
    assert law.training and flags == {name: p.requires_grad for name, p in law.named_parameters()}
    assert not [m for m in law.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
def test_experts_get_their_flags_back_at_the_end(root, end):
    """A user who goes on training the expert must not find it frozen."""
    model, law = make(root), load(root, "law").train()
    model.attach_expert("law", law)
    model.unload() if end == "unload" else model.delete_adapter("default")
    assert law.training and all(p.requires_grad for p in law.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True], ids=["in_config", "attached"])
def test_a_lora_expert_costs_its_lora_only(root, options, dtype, late):
    """It equals the standalone LoRA model exactly, shares all of the seed's storage, and never gets into the file."""
    name = f"lora{len(options) and next(iter(options))}"
    if not (root / name).exists():
        make_lora(root, name, **options)
    model = make(root, "code" if late else f"code {name}", dtype=dtype)
    if late:
        model.attach_expert(name, str(root / name))
    alone = PeftModel.from_pretrained(load(root, "seed", dtype=dtype), root / name)
    lora = model.base_model.experts["default"][name].model
    assert torch.equal(logits(lora), logits(alone)) and not torch.equal(
        logits(lora), logits(load(root, "seed", dtype=dtype))
    )

    hub = {p.data_ptr() for p in model.get_base_model().parameters()}
    own = [key for key, p in lora.named_parameters() if p.data_ptr() not in hub]
    assert own and all("lora_" in key or "modules_to_save" in key or "trainable_tokens" in key for key in own)
    assert not [key for key in trainable(model) if "stitch_layer" not in key]

    folder = save(train(model), root)
    assert all(".stitch_layer." in key for key in load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)), logits(model))


def test_a_lora_expert_as_an_object_equals_one_by_path(root):
    """Sharing the seed's weights is a saving, not another model."""
    by_path, by_object = make(root, "code"), make(root, "code")
    by_path.attach_expert("lora", str(root / "lora"))
    by_object.attach_expert("lora", PeftModel.from_pretrained(load(root, "seed"), root / "lora"))
    by_object.load_state_dict(by_path.state_dict())
    assert torch.equal(logits(by_path), logits(by_object))


def test_switching_adapters_leaves_lora_experts_alone(root):
    """PEFT's set_adapter and friends walk over LoRA layers by adapter name; an expert's have the same names."""
    model = make(root, "code lora")
    model.add_adapter("other", config(root, "lora"))
    lora = model.base_model.experts["default"]["lora"].model
    expected, names = logits(lora), trainable(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(lora), expected)
    assert trainable(model) == names
    with model.disable_adapter():
        assert torch.equal(logits(lora), expected)
    model.delete_adapter("other")
    assert torch.equal(logits(lora), expected)


@pytest.mark.parametrize("init", ["zero", "hub", "closed"])
def test_init_of_a_new_experts_gates(root, init):
    """How far a new expert changes a trained model from the first token on is what the user chose by `init`."""
    model = make(root, init_weights=True)
    train(model)
    before, old = logits(model), get_peft_model_state_dict(model)
    model.attach_expert("law", load(root, "law"), init=init)
    new = get_peft_model_state_dict(model)
    weight, bias = new[f"{LAST}.gate.law.weight"], new[f"{LAST}.gate.law.bias"]
    if init == "hub":
        assert torch.equal(weight, old[f"{LAST}.gate.hub.weight"])
        assert torch.equal(bias, old[f"{LAST}.gate.hub.bias"] - 2)
    else:
        assert not weight.any() and (bias == {"zero": 0, "closed": -6}[init]).all()
    assert not new[f"{FIRST}.gate.law.weight"].any() and not new[f"{FIRST}.gate.law.bias"].any()
    for stitch in (FIRST, LAST):
        projection = new[f"{stitch}.proj.law.weight"]
        assert torch.equal(projection, torch.eye(*projection.shape))
    change = (logits(model) - before).norm() / before.norm()
    assert change < 0.01 if init == "closed" else change > 0.01


@pytest.mark.parametrize("start", ["code math", "", "all detached"], ids=lambda start: start or "none")
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no_autocast"])
def test_new_weights_are_like_the_adapters(root, start, autocast):
    """Frozen new stitches would train to nothing without a word; those of another dtype would not run in half."""
    dtype = torch.bfloat16
    model = make(root, start if start == "" else "code math", dtype=dtype, autocast_adapter_dtype=autocast)
    if start == "all detached":
        for name in ("code", "math"):
            model.detach_expert(name)
    model.attach_expert("new", load(root, "law", dtype=dtype))
    assert {p.dtype for p in stitches(model)} == {torch.float32 if autocast else dtype}
    assert all(p.requires_grad for p in stitches(model))
    assert model.get_model_status().requires_grad == {"default": True}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in stitches(model))


@pytest.mark.parametrize("how", ["loaded", "inactive"])
def test_new_weights_of_a_frozen_adapter_are_frozen(root, how):
    """Else an expert attached for inference would be trained along with whatever is trained next."""
    if how == "loaded":
        model = PeftModel.from_pretrained(load(root, "seed"), save(make(root), root))
    else:
        model = two_adapters(root)
        model.set_adapter("other", inference_mode=True)
    model.attach_expert("new", load(root, "law"))
    assert not trainable(model)


def test_attach_goes_to_the_active_adapter_only(root):
    """The other adapter must neither see the new expert nor be changed by it."""
    model = two_adapters(root)
    expected = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.attach_expert("math", str(root / "math"))
    assert not torch.equal(logits(model), other)
    assert not [name for name in trainable(model) if ".stitch_layer.other." not in name]
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.detach_expert("math")
    model.set_adapter("other")
    model.detach_expert("math")
    assert torch.equal(logits(model), other)


def test_attach_while_disabled_or_frozen(root):
    """Attaching inside `disable_adapter` changes nothing there, and takes effect after it."""
    model = make(root)
    before = logits(model)
    with model.disable_adapter():
        model.attach_expert("law", load(root, "law"))
        assert torch.equal(logits(model), logits(load(root, "seed")))
    assert not torch.equal(logits(model), before)


def test_experts_have_no_dropout_of_their_own(root):
    """model.train() must not add noise to frozen experts; that would train stitches for models that nobody runs."""
    model = make(root)
    noisy = tiny_model("gpt2", seed=3, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.attach_expert("noisy", noisy)
    expected = logits(model.eval())
    model.train()
    assert model.training and not any(module.training for module in noisy.modules())
    assert torch.equal(logits(model), expected)
    logits(noisy.train())
    model.train()
    assert torch.equal(logits(model), expected)


def test_experts_never_get_into_the_file(root):
    """An adapter of a few MB that carries gigabytes of a third party's weights must not be uploaded."""
    model = make(root, "code math lora")
    model.attach_expert("law", load(root, "law"))
    for kwargs in [{}, {"state_dict": model.state_dict()}, {"safe_serialization": False}]:
        folder = save(model, root, **kwargs)
        file = folder / "adapter_model.safetensors"
        saved = load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)
        assert len(saved) == 4 * 3 + 2 + 4 * 3 and all(".stitch_layer." in key for key in saved)
        assert sorted(path.name for path in folder.iterdir() if "adapter_model" in path.name) == [
            "adapter_model.safetensors" if file.exists() else "adapter_model.bin"
        ]
