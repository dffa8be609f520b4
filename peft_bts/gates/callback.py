"""`GateLogger`: mean gates in a Trainer's logs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Optional

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..config import OUTPUT_MIXTURE
from .trace import GateTrace, trace_gates


class GateLogger(TrainerCallback):
    """Adds the gates to what the Trainer logs, and so to its history, TensorBoard and other reporters.

        Trainer(model=model, callbacks=[GateLogger()], ...)

    Wherever it is in the list, a Trainer calls it before its other callbacks, reporters among them. With every `loss`
    come, for the stitch behind each hub layer (0-based), over the tokens of that step's batches:

    - `gate/layer_3/code`: the mean gate of a model;
    - `gate_entropy/layer_3`: the normalised entropy of the gates (`GateTable`), 0 to 1.

    With `output="mixture"` come `gate/output/code` and `gate_entropy/output` besides.

    Only steps that are logged are traced (with `logging_strategy="epoch"` every step is, and the last of an epoch is
    logged). In distributed training the values are those of the main process's share of the batch.

    Raises:
        TypeError: When training starts, if the model has no stitches.
    """

    def __init__(self) -> None:
        self._tracing = ExitStack()
        self._trace: Optional[GateTrace] = None
        self._values: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with trace_gates(kwargs["model"]):  # an unfit model is an error now, not at the first step that is logged
            pass

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tracing.close()  # of a step that an exception ended
        logged = _will_be_logged(args, state)
        self._trace = self._tracing.enter_context(trace_gates(kwargs["model"])) if logged else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._trace is None:
            return
        self._tracing.close()
        trace, self._trace = self._trace, None
        self._values = {}
        for row in trace.table(by="stitch").rows if trace.sequences else []:
            place = "output" if row["kind"] == OUTPUT_MIXTURE else f"layer_{row['layer']}"
            self._values |= {f"gate/{place}/{name}": gate for name, gate in row["gates"].items()}
            self._values[f"gate_entropy/{place}"] = row["normalised_entropy"]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:  # not an evaluation's
            logs.update(self._values)
            state.log_history[-1].update(self._values)
            self._values = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tracing.close()


def _will_be_logged(args: TrainingArguments, state: TrainerState) -> bool:
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0:
        return True
    return args.logging_strategy == IntervalStrategy.EPOCH or (args.logging_first_step and step == 1)
