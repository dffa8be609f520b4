"""`GateLogger` in real Trainer runs: its values are in the history and in TensorBoard's files, and are right."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_bts import GateLogger, trace_gates
from tests.helpers.models import IDS, LEFT, fresh, stitch


DATA = [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in zip(IDS, LEFT)] * 8
MODELS = {0: {"code", "math"}, 1: {"hub", "code", "math"}, 2: {"code", "math"}, 3: {"hub", "code", "math"}}


def train(tmp_path, callbacks, config=None, **options):
    experts = {"code": fresh("llama", seed=1), "math": fresh("gpt2", seed=2)}
    model = stitch(fresh("llama"), experts, **(config or {}))
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.0,
        "label_names": ["labels"],
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | options),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def gates_in(logs):
    return {key: value for key, value in logs.items() if key.startswith("gate")}


def test_values_in_history_and_tensorboard(tmp_path, monkeypatch):
    """What TensorBoard shows at each logged step is what a trace of that step's batches says."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = train(
        tmp_path, [GateLogger()], report_to="tensorboard", eval_strategy="steps", eval_steps=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    with trace_gates(trainer.model) as trace, torch.no_grad():  # the learning rate is 0, and each step sees all data
        trainer.model(input_ids=IDS, attention_mask=LEFT)
    expected = {}
    for row in trace.table(by="stitch").rows:
        expected |= {f"gate/layer_{row['layer']}/{name}": gate for name, gate in row["gates"].items()}
        expected[f"gate_entropy/layer_{row['layer']}"] = row["normalised_entropy"]
        assert set(row["gates"]) == MODELS[row["layer"]]

    training = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [logs["step"] for logs in training] == [2, 4, 6]
    assert all(gates_in(logs) == pytest.approx(expected, abs=1e-5) for logs in training)
    others = [logs for logs in trainer.state.log_history if "loss" not in logs]
    assert len(others) == 4 and not any(gates_in(logs) for logs in others)  # three evaluations and the summary

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    for key, value in expected.items():
        written = events.Scalars(f"train/{key}")
        assert [event.step for event in written] == [2, 4, 6]
        assert [event.value for event in written] == pytest.approx([value] * 3, abs=1e-5)


@pytest.mark.parametrize("num_stitches", [0, 2])
def test_output_gates(tmp_path, num_stitches):
    """The gates of an output mixture come under a name of their own, beside those of stitches or alone."""
    config = {"output": "mixture", "num_stitches": num_stitches}
    trainer = train(tmp_path, [GateLogger()], config, max_steps=2, per_device_train_batch_size=16)
    with trace_gates(trainer.model) as trace, torch.no_grad():
        trainer.model(input_ids=IDS, attention_mask=LEFT)
    row = trace.table().rows[0]
    assert row["kind"] == "output_mixture" and set(row["gates"]) == {"hub", "code", "math"}
    expected = {f"gate/output/{name}": gate for name, gate in row["gates"].items()}
    expected["gate_entropy/output"] = row["normalised_entropy"]
    (logged,) = [gates_in(logs) for logs in trainer.state.log_history if "loss" in logs]
    assert {key: value for key, value in logged.items() if "output" in key} == pytest.approx(expected, abs=1e-5)
    assert any("layer_3" in key for key in logged) == (num_stitches > 0)


class Reporter(TrainerCallback):
    """Notes what it was given to report."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(gates_in(logs))


def test_every_callback_sees_the_gates(tmp_path):
    """Also those that were added before it; the order among the others stays."""
    reporter = Reporter()
    trainer = train(tmp_path, [reporter, GateLogger()], max_steps=2)
    assert len(reporter.seen[0]) > 8 and not reporter.seen[1]  # a step, and the summary
    ordered = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert ordered == ["GateLogger", "DefaultFlowCallback", "Reporter", *ordered[3:]]
    trainer.add_callback(GateLogger())
    ordered = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert ordered[:3] == ["GateLogger", "GateLogger", "DefaultFlowCallback"]


class WhenTraced(TrainerCallback):
    """Notes at which steps the model is traced while it computes."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if model.base_model._forward.settings.observers:
            self.steps.append(state.global_step + 1)


@pytest.mark.parametrize(
    "options, traced, logged",
    [
        ({"logging_steps": 3}, [3, 6], [3, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4], [1, 4]),
        ({"logging_strategy": "epoch", "max_steps": 16, "num_train_epochs": 2}, list(range(1, 17)), [8, 16]),
        ({"logging_strategy": "no"}, [], []),
    ],
    ids=["steps", "first", "epoch", "no"],
)
def test_only_logged_steps_are_traced(tmp_path, options, traced, logged):
    when = WhenTraced()
    trainer = train(tmp_path, [GateLogger(), when], **options)
    assert when.steps == traced
    assert [logs["step"] for logs in trainer.state.log_history if gates_in(logs)] == logged
    assert not trainer.model.base_model._forward.settings.observers


class Fails(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_training_can_be_started_again(tmp_path):
    """An exception in a traced step ends that step's trace with the next step of the same Trainer."""
    logger = GateLogger()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [logger, Fails()], logging_steps=1)
    trainer = train(tmp_path, [logger])
    assert [logs["step"] for logs in trainer.state.log_history if gates_in(logs)] == [2, 4, 6]


def test_a_model_without_stitches(tmp_path):
    """Told before the first step, not after hours of training."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=fresh("llama"), args=args, train_dataset=DATA, callbacks=[GateLogger])
    with pytest.raises(TypeError, match="stitch adapter"):
        trainer.train()
