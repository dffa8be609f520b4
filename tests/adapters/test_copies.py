"""Copies, casts and other dtypes of a stitched model, and what PEFT and Trainer may train besides the stitches."""

import copy
import io
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tests.helpers.checkpoints import assert_same, config, load, make, save, stitches, train
from tests.helpers.models import IDS, logits


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


@pytest.mark.parametrize("module", ["lm_head", "down_proj"])
def test_lora_experts_share_the_seed_without_trained_copies(root, module):
    """A LoRA runs on the seed that it was made for, whatever this adapter trains of it; in stitched layers, too."""
    model = train(make(root, "code", modules_to_save=[module]))
    model.attach_expert("late", str(root / "lora"))
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
