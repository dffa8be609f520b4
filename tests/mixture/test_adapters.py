"""Output gates come, go, are saved and loaded with their adapter, as stitches do."""

import copy
import functools
import io
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.checkpoints import (
    assert_same,
    assert_untouched,
    config,
    load,
    make,
    read,
    save,
    state,
    stitches,
    train,
    trainable,
)
from tests.helpers.models import IDS, LEFT, assert_near, expected_logits, logits
from tests.helpers.reference import reference_forward


PREFIX = "base_model.model.stitch_output.gate"
OPTIONS = {"alone": {"num_stitches": 0}, "stitched": {}}


@pytest.fixture(params=OPTIONS)
def options(request):
    return {"output": "mixture", **OPTIONS[request.param]}


def expected(root, model, names, **kwargs):
    """By the reference, with models that were loaded once more."""
    experts = {}
    for name in names.split():
        lora = name.startswith("lora")
        experts[name] = (
            PeftModel.from_pretrained(load(root, "seed"), root / name).get_base_model() if lora else load(root, name)
        )
    return expected_logits(model, load(root, "seed").eval(), experts, **kwargs)


# ----------------------------------------------------------------------------------------------------------- the file


def test_the_file_to_the_letter(root, options, tmp_path):
    """Keys, shapes and dtypes that other tools rely on: one tensor per model and role, and nothing else is new."""
    make(root, **options).save_pretrained(tmp_path)
    tensors, saved = read(tmp_path)
    gates = {key: tuple(tensor.shape) for key, tensor in tensors.items() if "stitch_output" in key}
    assert gates == {
        f"{PREFIX}.{name}.{part}": (1, 32) if part == "weight" else (1,)
        for name in ("code", "hub", "math")
        for part in ("weight", "bias")
    }
    others = tensors.keys() - gates.keys()
    assert others == (set() if options.get("num_stitches") == 0 else read_without_mixture(root).keys())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert saved["output"] == "mixture"


def read_without_mixture(root):
    return read(save(make(root), root))[0]


def test_files_from_before_the_option(root):
    """A config without `output` is one of the hub's head alone."""
    model = make(root)
    folder = save(model, root)
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values.pop("output") == "hub"
    (folder / "adapter_config.json").write_text(json.dumps(values))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert loaded.active_peft_config.output == "hub"
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "how",
    [{}, {"adapter_name": "mine"}, {"is_trainable": True}, {"low_cpu_mem_usage": True}],
    ids=lambda how: "+".join(how) or "plain",
)
def test_save_then_load(root, options, how):
    """Every way to load gives the same bits, frozen unless it is to be trained; and the reference agrees."""
    model = train(make(root, "code math lora", **options))
    folder = save(model, root)
    loaded = PeftModel.from_pretrained(load(root, "seed"), folder, **how)
    assert torch.equal(logits(loaded), logits(model))
    assert_near(logits(loaded), expected(root, model, "code math lora"), 2e-4)
    own = stitches(loaded, how.get("adapter_name", "default"))
    assert len(trainable(loaded)) == (len(own) if how.get("is_trainable") else 0)
    again = save(loaded, root)
    again = again if loaded.active_adapter == "default" else again / loaded.active_adapter
    assert_same(read(again)[0], read(folder)[0])
    if how.get("is_trainable"):
        train(loaded)


def test_auto_class_and_load_adapter(root, options):
    model = train(make(root, **options))
    folder = save(model, root)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(model))
    other = make(root, "math")
    before = logits(other)
    other.load_adapter(folder, "second")
    assert torch.equal(logits(other), before)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    other.set_adapter("default")
    assert torch.equal(logits(other), before)


def test_wrong_files(root):
    """Gates that are missing or too many are named, and nothing is loaded."""
    with_gates, without = save(make(root, output="mixture"), root), save(make(root), root)
    for wrong, right, message in (
        (with_gates, without, "not part of this adapter: .*stitch_output.gate.code.weight"),
        (without, with_gates, "missing: .*stitch_output.gate.code.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(root, "seed"), wrong, config=StitchConfig.from_pretrained(right))


# ------------------------------------------------------------------------------------------------- experts come and go


@pytest.mark.parametrize("init", ["zero", "hub", "closed"])
def test_attach(root, options, init):
    """A new expert's gate starts as asked for, of the others none moves; detached, all is as it was, bit for bit."""
    model = train(make(root, init_weights=True, **options))
    before, old = state(model), get_peft_model_state_dict(model)
    first, names = logits(model), trainable(model)
    model.attach_expert("law", load(root, "law"), init=init)
    new = get_peft_model_state_dict(model)
    assert_same({key: new[key] for key in old}, old)
    weight, bias = new[f"{PREFIX}.law.weight"], new[f"{PREFIX}.law.bias"]
    if init == "hub":
        assert torch.equal(weight, old[f"{PREFIX}.hub.weight"])
        assert torch.equal(bias, old[f"{PREFIX}.hub.bias"] - 2)
    else:
        assert not weight.any() and bias == {"zero": 0, "closed": -6}[init]
    assert_near(logits(model), expected(root, model, "code math law"), 2e-4)
    change = (logits(model).exp() - first.exp()).abs().max()
    assert change < 0.02 if init == "closed" else change > 0.02
    added = trainable(model) - names
    assert {name for name in added if "stitch_output" in name} == {
        f"base_model.model.stitch_output.default.gate.for_law.{part}" for part in ("weight", "bias")
    }
    train(model)
    model.load_state_dict(before, strict=False)
    model.detach_expert("law")
    assert_same(state(model), before)
    assert torch.equal(logits(model), first) and trainable(model) == names


def test_detach_and_active_experts(root, options):
    """Without an expert the softmax goes over the others, whether it was detached or is left out."""
    model = train(make(root, "code math law", **options))
    with model.set_active_experts(["code", "law"]):
        left_out = logits(model)
    model.detach_expert("math")
    assert torch.equal(logits(model), left_out)
    assert_near(left_out, expected(root, model, "code law"), 2e-4)
    model.detach_expert("code"), model.detach_expert("law")
    with pytest.raises(ValueError, match="No expert is attached"):
        logits(model)


def test_a_frozen_adapter_gets_frozen_gates(root, options):
    model = PeftModel.from_pretrained(load(root, "seed"), save(make(root, **options), root))
    model.attach_expert("law", load(root, "law"))
    assert not trainable(model)


def test_an_expert_of_an_unknown_head_changes_nothing(root, options):
    """A model that does more behind its layers than its modules tell is refused for mixtures, by name."""
    model = make(root, **options)
    before, first = state(model), logits(model)
    odd = load(root, "law")
    norm = scaled(odd.transformer).ln_f
    flags = odd.training, {name: p.requires_grad for name, p in odd.named_parameters()}
    with pytest.raises(ValueError, match=r"Expert 'odd' makes its final hidden states in a way that is not known"):
        model.attach_expert("odd", odd)
    assert flags == (odd.training, {name: p.requires_grad for name, p in odd.named_parameters()})
    assert odd.transformer.ln_f is norm and not norm._forward_hooks
    assert_same(state(model), before)
    assert torch.equal(logits(model), first)
    make(root).attach_expert("odd", odd)  # whose head nobody asks for


def scaled(backbone):
    """Have a backbone do something of its own behind its last module."""
    own = type(backbone)

    class Odd(own):
        @functools.wraps(own.forward)
        def forward(self, *args, **kwargs):
            out = own.forward(self, *args, **kwargs)
            out.last_hidden_state = 2 * out.last_hidden_state
            return out

    backbone.__class__ = Odd
    return backbone


# ---------------------------------------------------------------------------------------------------- several adapters


def test_adapters_of_both_kinds(root, options):
    """Adapters with output gates and without, on one hub: each is the model that it is alone."""
    model = make(root, **options)
    model.add_adapter("plain", config(root, "code law"))
    model.add_adapter("other", config(root, "law", output="mixture", num_stitches=0))
    folder, results = save(model, root), {}
    for name in ("default", "plain", "other", "default"):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(load(root, "seed"), folder / ("" if name == "default" else name))
        results[name] = logits(model)
        assert torch.equal(results[name], logits(alone))
        assert trainable(model) == {n for n in state(model) if f".stitch_layer.{name}." in n or f"put.{name}." in n}
        status = model.get_model_status()
        assert status.active_adapters == [name] and status.enabled is True
        assert status.requires_grad == {other: other == name for other in ("default", "plain", "other")}
    for name, active in (("default", "plain"), ("plain", "other")):
        model.set_adapter(active)
        model.delete_adapter(name)
        assert torch.equal(logits(model), results[active])
        assert not [key for key in state(model) if f".{name}." in key]
    assert model.base_model.model.stitch_output.keys() == {"other"}


def test_training_one_adapter_leaves_the_other(root, options):
    model = make(root, **options)
    model.add_adapter("other", config(root, "code law", **options))
    before = state(model)
    model.set_adapter("other")
    train(model)
    after = state(model)
    assert_same(*({k: v for k, v in s.items() if ".other." not in k} for s in (after, before)))


@pytest.mark.parametrize("name", ["stitch_output", "gate", "for_code", "hub", "mine"])
def test_no_adapter_name_costs_gates(root, options, name):
    """PEFT drops keys by substring when it saves: such names are refused, or both adapters survive."""
    model = make(root, **options)
    before = logits(model)
    try:
        model.add_adapter(name, config(root, "code law", **options))
    except ValueError as error:
        assert repr(name) in str(error) and name != "mine"
        assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]
        return
    folder = save(model, root)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder)), before)
    model.set_adapter(name)
    assert torch.equal(logits(PeftModel.from_pretrained(load(root, "seed"), folder / name)), logits(model))


def test_disable_is_the_seed(root, options):
    seed = logits(load(root, "seed"))
    model = make(root, "code lora", **options)
    mixed = logits(model)
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(model), seed)
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), mixed) and not torch.equal(mixed, seed)
    assert len(trainable(model)) == len(stitches(model))


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"], ["model.norm"]], ids=str)
@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
def test_the_seed_is_given_back(root, options, end, modules_to_save):
    """The very object, bitwise, without a hook, and ready to be stitched again."""
    seed = load(root, "seed")
    first, before = logits(seed), state(seed)
    options = options | {"modules_to_save": modules_to_save}
    torch.manual_seed(0)
    model = get_peft_model(seed, config(root, **options))
    mixed = logits(model)
    train(model)
    assert model.unload() is seed if end == "unload" else model.delete_adapter("default") is None
    assert_untouched(seed)
    assert_same(state(seed), before)
    assert torch.equal(logits(seed), first)
    assert "forward" not in vars(seed) and not hasattr(seed, "stitch_output")
    torch.manual_seed(0)
    assert torch.equal(logits(get_peft_model(seed, config(root, **options))), mixed)


def test_a_failure_leaves_the_seed_alone(root, options, monkeypatch):
    """An error at the very end of making an adapter undoes all that was done before."""
    seed = load(root, "seed")
    first, flags = logits(seed), {name: p.requires_grad for name, p in seed.named_parameters()}

    def fail(*args, **kwargs):
        raise MemoryError("no room for gates")

    monkeypatch.setattr("peft_bts.tuner.OutputMixture", fail)
    with pytest.raises(MemoryError, match="no room"):
        get_peft_model(seed, config(root, **options))
    assert_untouched(seed)
    assert "forward" not in vars(seed) and not hasattr(seed, "stitch_output")
    assert flags == {name: p.requires_grad for name, p in seed.named_parameters()}
    assert torch.equal(logits(seed), first)


# ------------------------------------------------------------------------------------------- what goes with an adapter


@pytest.mark.parametrize("modules_to_save", ["lm_head", "model.norm", "embed_tokens"])
def test_modules_to_save(root, options, modules_to_save):
    """A hub's own head or norm that is trained besides speaks in the mixture, and is saved and loaded."""
    model = make(root, "code lora", modules_to_save=[modules_to_save], **options)
    train(model)
    hub = load(root, "seed")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"{modules_to_save}.modules_to_save.default" in name:
                path = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
                hub.get_parameter(path).copy_(p)
    lora = PeftModel.from_pretrained(load(root, "seed"), root / "lora").get_base_model()
    tensors, saved = read(save(model, root))
    tensors = {key: tensor for key, tensor in tensors.items() if "stitch_" in key}
    with torch.no_grad():
        want = reference_forward(hub, {"code": load(root, "code"), "lora": lora}, tensors, saved, IDS)
    assert_near(logits(model), want, 2e-4)
    loaded = AutoPeftModelForCausalLM.from_pretrained(save(model, root))
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load(root, "seed")))


def clone_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_torch])
def test_copies_are_equal_and_independent(root, options, clone):
    model = make(root, "code math lora", **options)
    first = logits(model)
    twin = clone(model)
    assert torch.equal(logits(twin), first)
    assert not ({t.data_ptr() for t in state_of(model)} & {t.data_ptr() for t in state_of(twin)})
    train(twin).detach_expert("math")
    assert torch.equal(logits(model), first)
    changed = logits(twin)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), changed)


def state_of(model):
    return model.state_dict().values()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_casts_everything(root, options, dtype):
    model = make(root, "code lora", **options)
    cast = model.half() if dtype == torch.float16 else model.to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    assert logits(cast).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits(cast).isfinite().all()


def test_a_lora_with_a_head_of_its_own(root, options):
    """What a LoRA does to the head (here: its own copy of it) it does in the mixture."""
    lora = LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    expert = get_peft_model(load(root, "seed"), lora).eval()
    with torch.no_grad():
        expert.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.5)
    model = make(root, "code", **options)
    model.attach_expert("lora", expert)
    plain = copy.deepcopy(expert).get_base_model()
    want = expected_logits(model, load(root, "seed"), {"code": load(root, "code"), "lora": plain})
    assert_near(logits(model), want, 2e-4)


def test_a_resized_hub(root, options, tmp_path):
    """A head that is exchanged after stitching speaks from then on; the experts lack the new tokens."""
    model = make(root, "code", **options)
    model.resize_token_embeddings(70)
    hub = copy.deepcopy(model.get_base_model().get_output_embeddings())
    want = load(root, "seed")
    want.resize_token_embeddings(70)
    want.set_output_embeddings(hub)
    want.set_input_embeddings(copy.deepcopy(model.get_base_model().get_input_embeddings()))
    tensors, saved = read(save(model, root, save_embedding_layers=False))
    with torch.no_grad():
        want = reference_forward(want, {"code": load(root, "code")}, tensors, saved, IDS)
    assert logits(model).shape[-1] == 70
    assert_near(logits(model), want, 2e-4)


def test_padded_batches_of_a_loaded_model(root, options):
    model = AutoPeftModelForCausalLM.from_pretrained(save(make(root, "code law", **options), root))
    assert isinstance(model.get_base_model(), type(AutoModelForCausalLM.from_pretrained(root / "seed")))
    want = expected(root, model, "code law", attention_mask=LEFT)
    assert_near(logits(model, attention_mask=LEFT)[LEFT.bool()], want[LEFT.bool()], 2e-4)
