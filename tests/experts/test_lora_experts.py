"""LoRA adapters of the seed as experts: two of them and a full model, next to each other, in everything users do."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_bts import StitchConfig
from tests.helpers.gradients import backward, close
from tests.helpers.models import IDS, LEFT, assert_near, expected_logits, logits, randomize
from tests.helpers.zoo import tiny_model


ARCHITECTURES = ["llama", "gpt2", "gemma2", "qwen3_moe"]  # gpt2: Conv1D layers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    """A seed, two LoRAs of it, a full expert."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(root / "seed")
    tiny_model(request.param, seed=1).save_pretrained(root / "full")
    target = ["c_attn", "c_proj"] if request.param == "gpt2" else ["q_proj", "o_proj"]
    for seed, name in enumerate(("law", "bio")):
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=target, init_lora_weights=False)
        get_peft_model(plain(root / "seed"), lora).save_pretrained(root / name)
    return root


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_lora(root, name):
    return PeftModel.from_pretrained(plain(root / "seed"), root / name).eval()


def stitched(root, **options):
    experts = {name: str(root / name) for name in ("law", "bio", "full")}
    config = StitchConfig(task_type="CAUSAL_LM", experts=experts, **options)
    return randomize(get_peft_model(plain(root / "seed"), config)).eval()


@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_forward(folder, output):
    """Two LoRAs and a full expert equal the reference, which stitches standalone PEFT models."""
    model = stitched(folder, output=output)
    loras = {name: with_lora(folder, name) for name in ("law", "bio")}
    for name, alone in loras.items():
        assert torch.equal(logits(model.base_model.experts["default"][name].model), logits(alone))
    experts = {"full": plain(folder / "full")} | {name: alone.base_model.model for name, alone in loras.items()}
    expected = expected_logits(model, plain(folder / "seed"), experts, attention_mask=LEFT)
    assert_near(logits(model, attention_mask=LEFT), expected, 1e-4)


def test_memory(folder):
    """A LoRA expert adds its own weights and nothing else."""
    model, loras = stitched(folder), [with_lora(folder, name) for name in ("law", "bio")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    parts = [plain(folder / "seed"), plain(folder / "full")]
    expected = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in parts for t in m.state_dict().values()
    }
    own = sum(p.nbytes for m in loras for n, p in m.named_parameters() if "lora_" in n)
    stitches = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(storages.values()) == sum(expected.values()) + own + stitches


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(folder, use_reentrant):
    """Recomputed layers are those with the LoRA: same gradients, and none for the LoRA's own weights."""
    model = stitched(folder).train()
    expected = backward(model, attention_mask=LEFT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close(backward(model, attention_mask=LEFT), expected, 1e-4)
    assert all("stitch_" in name for name in expected)


@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_train_save_load_generate(folder, output, tmp_path):
    """Trainer, then the whole composition again from the adapter's folder: same logits, same tokens."""
    model = stitched(folder, num_stitches=2, output=output)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", per_device_train_batch_size=2, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.gradient_checkpointing_disable()
    model.eval()
    assert before and all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))
    call = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**call)
    assert torch.equal(again.generate(**call), tokens)
    assert torch.equal(model.generate(use_cache=False, **call), tokens)
