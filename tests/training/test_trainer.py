"""Stitches train under transformers' Trainer as a LoRA does: the same options, nothing special to set.

Training changes stitches only, and `load_best_model_at_end`: tests/test_save_load.py; gradient checkpointing through
Trainer: tests/test_peft_surface.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tests import ROOT
from tests.helpers.models import assert_near, expected_logits, fresh, pristine, stitch
from tests.helpers.reference import reference_forward
from tests.helpers.text import document, save_model, token_rows, word_tokenizer


ROWS = token_rows()
EXPERTS = {"code": ("llama", {"seed": 1, "width": 48}), "math": ("qwen3", {"seed": 2, "layers": 6})}


def make(hub=None, **options):
    experts = {name: fresh(arch, **o) for name, (arch, o) in EXPERTS.items()}
    return stitch(fresh("llama") if hub is None else hub, experts, **options)


def trainer_of(model, folder, train=ROWS, evaluate=None, **options):
    names = TrainingArguments.__dataclass_fields__.keys() & options.keys()
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments |= {"report_to": [], "use_cpu": True, "logging_steps": 1, "disable_tqdm": True}
    arguments |= {name: options.pop(name) for name in names}
    arguments = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=evaluate, **options)


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}


def reference_logits(model, input_ids, **kwargs):
    experts = {name: pristine(arch, **o) for name, (arch, o) in EXPERTS.items()}
    return expected_logits(model, pristine("llama"), experts, input_ids, **kwargs)


def reference_loss(model, batch):
    """Next-token loss per predicted token, by the reference."""
    logits, labels = reference_logits(model, batch["input_ids"], **mask_of(batch))[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits[labels != -100], labels[labels != -100]).item()


def mask_of(batch):
    return {key: batch[key] for key in batch if key == "attention_mask"}


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation(tmp_path):
    """Losses by domain, of the stitched model, with nothing set that a LoRA would not need set."""
    model = make()
    domains = {"code": ROWS[:5], "math": ROWS[5:8]}
    trainer = trainer_of(model, tmp_path, evaluate=domains, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert trainer.label_names == ["labels"]
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for domain, rows in domains.items():
        assert logged[f"eval_{domain}_loss"] == pytest.approx(
            reference_loss(model, default_data_collator(rows)), rel=1e-4
        )


def test_predict_and_compute_metrics(tmp_path):
    """Predictions are the stitched model's logits, and labels come with them."""

    def accuracy(predictions):
        hits = predictions.predictions[:, :-1].argmax(-1) == predictions.label_ids[:, 1:]
        return {"accuracy": hits.mean()}

    model = make()
    output = trainer_of(model, tmp_path, compute_metrics=accuracy).predict(ROWS[:5])
    batch = default_data_collator(ROWS[:5])
    logits = reference_logits(model, batch["input_ids"])
    assert_near(torch.from_numpy(output.predictions), logits, 1e-5)
    expected = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).float().mean().item()
    assert output.metrics["test_accuracy"] == pytest.approx(expected)
    assert output.metrics["test_loss"] == pytest.approx(reference_loss(model, batch), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_collator(side, tmp_path):
    """DataCollatorForLanguageModeling pads texts of unequal length; the padding is in neither loss nor attention."""
    tokenizer = word_tokenizer(padding_side=side)
    rng = random.Random(0)
    texts = [document(1, length, rng) for length in (3, 17, 8, 12, 5, 9)]
    rows = [tokenizer(text) for text in texts]
    model, collator = make(), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = trainer_of(
        model,
        tmp_path,
        train=rows,
        evaluate=rows,
        data_collator=collator,
        per_device_eval_batch_size=6,
        train_sampling_strategy="group_by_length",
    )
    trainer.train()
    batch = collator(rows)
    assert (batch["attention_mask"][:, 0 if side == "left" else -1] == 0).sum() == 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(model, batch), rel=1e-4)


# --------------------------------------------------------------------------------------------------------- training


def test_training_is_the_references_training(tmp_path):
    """Trainer's loop with our model gives the weights of a plain loop over the reference's gradients."""
    model = make()
    experts = {name: pristine(arch, **o) for name, (arch, o) in EXPERTS.items()}
    tensors = {key: tensor.requires_grad_() for key, tensor in weights(model).items()}
    config = model.peft_config["default"].to_dict()
    rows = torch.stack([row["input_ids"] for row in ROWS[:4]])
    trainer = trainer_of(model, tmp_path, train=ROWS[:4], optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer.train()

    optimizer, expected = torch.optim.SGD(tensors.values(), lr=1e-2), []
    for _ in range(3):
        logits = reference_forward(pristine("llama"), experts, tensors, config, rows)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    for key, tensor in weights(model).items():
        assert_near(tensor, tensors[key].detach(), 1e-4)


def test_gradient_accumulation(tmp_path):
    """Two batches of two are one of four, also where rows have unequal numbers of labels."""
    rows = [dict(row, labels=row["labels"].clone()) for row in ROWS[:8]]
    for i, row in enumerate(rows):
        row["labels"][: i + 1] = -100
    whole, parts = make(), make()
    options = {"max_steps": 2, "train_sampling_strategy": "sequential", "optim": "sgd"}
    first = trainer_of(whole, tmp_path, rows, **options)
    second = trainer_of(parts, tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    first.train(), second.train()
    assert losses(second) == pytest.approx(losses(first), rel=1e-5)
    for key, tensor in weights(parts).items():
        assert_near(tensor, weights(whole)[key], 1e-5)


def test_weight_decay_groups(tmp_path):
    """As everywhere: weights decay, biases do not; and the optimizer knows nothing but stitch weights."""
    model = make(num_stitches=2)
    optimizer = trainer_of(model, tmp_path, weight_decay=0.1).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    stitches = {name for name in names.values() if ".stitch_layer." in name}
    assert groups == {
        0.1: {name for name in stitches if name.endswith(".weight")},
        0.0: {name for name in stitches if name.endswith(".bias")},
    }
    assert groups[0.1] and groups[0.0]


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("hub_dtype", [torch.float32, torch.bfloat16], ids=["float32_hub", "bfloat16_hub"])
def test_bf16(hub_dtype, tmp_path):
    """Under autocast the stitches stay float32, the models stay what they were, and the losses stay close."""
    exact = trainer_of(make(), tmp_path)
    exact.train()
    model = stitch(
        fresh("llama", dtype=hub_dtype),
        {name: fresh(arch, dtype=hub_dtype, **o) for name, (arch, o) in EXPERTS.items()},
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path, bf16=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.02)
    assert losses(trainer) != losses(exact)  # it was bfloat16
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".stitch_layer." in key else hub_dtype)
        assert ".stitch_layer." in key or torch.equal(tensor, before[key])


def test_fp16_with_a_gradient_scaler():
    """What `fp16=True` does on a GPU, by hand: on a CPU, accelerate trains in float32 instead, without a word."""
    model, exact = make(), make()
    rows = torch.stack([row["input_ids"] for row in ROWS[:4]])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)  # 30: the first steps overflow
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, exact)]
    taken = 0
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=rows, labels=rows).loss
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        if scaler.get_scale() < before:  # skipped: some gradient was infinite
            continue
        expected = exact(input_ids=rows, labels=rows).loss
        expected.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=0.01)
        taken += 1
        if taken == 3:
            break
    assert taken == 3
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


# ------------------------------------------------------------------------------------------------- being cut off


class Recorder(TrainerCallback):
    """Writes the exact loss of every step, and kills the process amid step `fatal`, between backward and update."""

    def __init__(self, path, fatal=None):
        self.path, self.fatal = path, fatal

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            with open(self.path, "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")


STEPS = 10


def train_as_a_user(models, output, record, dropout, fatal=None, resume=False):
    """From folders to a saved adapter; runs here and, as the main program of this file, in a process that dies."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from peft_bts import StitchConfig

    torch.set_num_threads(1)
    set_seed(7)
    hub = AutoModelForCausalLM.from_pretrained(models / "seed")
    experts = {name: str(models / name) for name in ("code", "math")}
    options = {"num_stitches": 2, "r": 4, "gate_dropout": dropout}
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", experts=experts, **options))
    trainer = trainer_of(
        model,
        output,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        warmup_steps=3,
        callbacks=[Recorder(record, fatal)],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def read_record(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("dropout", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
def test_killed_and_resumed(dropout, tmp_path):
    """A process is killed at any step and another one resumes: the losses are those of a run that was not killed."""
    for name, (arch, options) in {"seed": ("llama", {}), **EXPERTS}.items():
        save_model(tmp_path / name, arch, **options)
    train_as_a_user(tmp_path, tmp_path / "whole", tmp_path / "whole.jsonl", dropout=dropout)
    expected = read_record(tmp_path / "whole.jsonl")
    assert [step for step, _, _ in expected] == list(range(1, STEPS + 1))

    fatal = random.SystemRandom().randint(3, STEPS)  # in the middle of this step; there is a checkpoint before it
    print(f"killed amid step {fatal}")
    record, output = tmp_path / "killed.jsonl", tmp_path / "killed"

    command = [sys.executable, "-m", __name__, str(tmp_path), str(output), str(record), str(fatal), str(dropout)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert read_record(record) == expected[: fatal - 1]
    assert not (output / "adapter_model.safetensors").exists()
    shutil.copytree(output, tmp_path / "without_rng")

    train_as_a_user(tmp_path, output, record, resume=True, dropout=dropout)
    start = (fatal - 1) // 2 * 2  # the last checkpoint
    assert read_record(record)[fatal - 1 :] == expected[start:]
    actual, whole = (load_file(folder / "adapter_model.safetensors") for folder in (output, tmp_path / "whole"))
    assert actual.keys() == whole.keys() and all(torch.equal(actual[key], whole[key]) for key in whole)

    # That this can fail: without the saved state of the random numbers, dropout draws others.
    if dropout:
        for state in (tmp_path / "without_rng").glob("*/rng_state.pth"):
            state.unlink()
        other = tmp_path / "other.jsonl"
        train_as_a_user(tmp_path, tmp_path / "without_rng", other, resume=True, dropout=dropout)
        assert read_record(other) != expected[start:]


def test_resuming_with_modules_to_save(tmp_path):
    """What the hub trains besides the stitches is in the checkpoint as well."""
    options = {"modules_to_save": ["lm_head"], "num_stitches": 2, "gate": "token"}
    whole = make(**options)
    trainer_of(whole, tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = make(**options)
    trainer_of(resumed, tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("lm_head" in key for key in weights(whole))
    for key, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[key]), key


# --------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_torch_compile(tmp_path):
    eager = trainer_of(make(), tmp_path)
    compiled = trainer_of(make(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    eager.train(), compiled.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


if __name__ == "__main__":
    models, output, record = map(Path, sys.argv[1:4])
    train_as_a_user(models, output, record, fatal=int(sys.argv[4]), dropout=float(sys.argv[5]))
