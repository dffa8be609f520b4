"""`examples/distill.py`: the student comes nearer to the teacher, and is a plain model."""

import runpy
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from tests.examples.test_examples import EXAMPLES, ROWS, TRAINING, common, data, read_losses, root, run_here, word_rows
from tests.helpers.models import IDS, fresh, randomize, stitch


__all__ = ["common", "root"]  # fixtures


@pytest.fixture
def script(common):
    return runpy.run_path(str(EXAMPLES / "distill.py"))


def test_divergence(script):
    """The definition, token by token; the last token and those without a label do not count."""
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 3, 4], [1, -100, -100, 2, 5]])
    found = []
    for row, column in ((0, 0), (0, 2), (0, 3), (1, 2), (1, 3)):
        p, q = teacher[row, column].softmax(0), student[row, column].softmax(0)
        found.append((p * (p / q).log()).sum())
    assert script["divergence_from"](teacher, student, labels).item() == pytest.approx(
        torch.stack(found).mean().item()
    )
    assert script["divergence_from"](teacher, teacher, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_of_a_step(script, tmp_path, weight):
    """The mixture of both losses in training, that of the labels in evaluation; the teacher is left alone."""
    teacher = stitch(fresh("llama"), {"code": fresh("llama", seed=1)})
    student = fresh("llama").train()
    arguments = script["TrainingArguments"](str(tmp_path), use_cpu=True, report_to="none")
    trainer = script["DistillTrainer"](model=student, teacher=teacher, data_weight=weight, args=arguments)
    inputs = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        ours, theirs = student(**inputs), teacher(input_ids=IDS).logits
        divergence = script["divergence_from"](theirs, ours.logits, IDS)
        expected = weight * ours.loss + (1 - weight) * divergence
    loss = trainer.compute_loss(student, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert trainer.compute_loss(student.eval(), inputs).item() == pytest.approx(ours.loss.item(), rel=1e-5)


def test_a_student(root, common, tmp_path, monkeypatch):
    """By the script: from the hub, nearer to the teacher than the hub, and loaded without this package's help."""
    names = ["--hub", root / "seed", "--expert", f"code={root / 'code'}", "--output_dir", tmp_path / "stitch"]
    options = [*data(root, "code"), *ROWS, *TRAINING]
    run_here(monkeypatch, "train_stitch.py", *names, *options, "--num_stitches", 2, "--max_steps", 1)
    teacher = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "stitch")
    randomize(teacher).save_pretrained(tmp_path / "stitch")

    out = tmp_path / "student"
    run_here(
        monkeypatch, "distill.py", "--adapter", tmp_path / "stitch", *options, "--max_steps", 40, "--output_dir", out
    )
    student = AutoModelForCausalLM.from_pretrained(out)
    assert type(student).__name__ == "LlamaForCausalLM" and (out / "tokenizer.json").exists()
    rows = word_rows(root / "code.jsonl")[:8]
    distance = runpy.run_path(str(EXAMPLES / "distill.py"))["divergence_from"]
    hub = AutoModelForCausalLM.from_pretrained(root / "seed")
    with torch.no_grad():
        theirs = teacher.eval()(input_ids=rows).logits
        before, after = (distance(theirs, model(input_ids=rows).logits, rows) for model in (hub, student))
    assert after < 0.8 * before
    assert list(read_losses(out)) == ["code"]

    monkeypatch.setattr(sys, "argv", ["distill.py", "--adapter", "x", "--data_weight", "2", *options])
    with pytest.raises(ValueError, match=r"--data_weight 2\.0 is a share"):
        runpy.run_path(str(EXAMPLES / "distill.py"), run_name="__main__")
