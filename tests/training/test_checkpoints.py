"""Trainer's checkpoints: stitches only, resumed as if never stopped, and the best one loaded at the end."""

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import assert_same, make, read, train_by_trainer
from tests.helpers.zoo import tiny_model


def test_training_changes_stitches_only(root, tmp_path):
    """The hub and the experts are frozen models of other people: bitwise the same after training."""
    model = make(root, "code math lora", num_stitches=4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_by_trainer(model, tmp_path)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert after.keys() == before.keys()
    assert changed == {key for key in before if ".stitch_layer." in key}


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_resuming_equals_not_stopping(root, tmp_path, adapter_name):
    """A job that was cut off goes on as if nothing had happened: the same weights, bitwise."""
    whole = make(root, adapter_name=adapter_name)
    train_by_trainer(whole, tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    tensors, _ = read(checkpoint if adapter_name == "default" else checkpoint / adapter_name)
    assert len(tensors) == 14 and all(".stitch_layer." in key for key in tensors)

    resumed = make(root, adapter_name=adapter_name, seed=1)
    trainer = train_by_trainer(resumed, tmp_path / "resumed", resume=checkpoint)
    assert trainer.state.global_step == 4
    assert_same(resumed.state_dict(), whole.state_dict())
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == {
        name for name, p in whole.named_parameters() if p.requires_grad
    }


def test_load_best_model_at_end(root, tmp_path):
    """The weights of the best checkpoint are those in memory after training, and still trainable."""
    model = make(root, "code")
    model.attach_expert("object", tiny_model("llama", seed=5))  # no reference: reloading must not need one
    trainer = train_by_trainer(
        model,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, which is not the last
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    model.save_pretrained(tmp_path / "end")
    assert_same(read(tmp_path / "end")[0], read(best)[0])
    assert not torch.equal(*(next(iter(read(tmp_path / name)[0].values())) for name in ("end", "checkpoint-4")))
    assert all(p.requires_grad for name, p in model.named_parameters() if ".stitch_layer." in name)
