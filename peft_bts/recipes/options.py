"""What a recipe can say, as dataclasses: every field is a key of the file and a flag of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, get_type_hints

from transformers import TrainingArguments

from ..config import StitchConfig


@dataclass
class ModelOptions:
    """The models, and where they are uploaded to."""

    _argument_group_name = "models"

    hub: str = field(
        default="",
        metadata={"help": "The seed model: a folder, or an id on the Hub, id@revision.", "metavar": "MODEL"},
    )
    experts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The experts: NAME=MODEL, or NAME={...}, a reference in JSON. In a file, a mapping.",
            "metavar": "NAME=MODEL",
        },
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Of hub and experts; stitches are float32."}
    )
    push_experts_to: Optional[str] = field(
        default=None,
        metadata={"help": "For `push`: where experts go that exist only here, such as org/seed-{name}."},
    )
    push_seed_to: Optional[str] = field(
        default=None, metadata={"help": "For `push`: where the seed goes, if it exists only here."}
    )


@dataclass
class DataOptions:
    """The data of every domain."""

    _argument_group_name = "data"

    datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training data: NAME=SOURCE[:WEIGHT]. A source is a file, a pattern of files, a folder, or an id "
            "on the Hub, org/name or org/name/subset; the weight is the domain's share, relative to the others'. In "
            "a file, a mapping to a source, or to `source` and `weight`.",
            "metavar": "NAME=SOURCE",
        },
    )
    evaluation: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Evaluation data: NAME=SOURCE. Domains that are not named here hold out some of their documents.",
            "metavar": "NAME=SOURCE",
        },
    )
    held_out: int = field(default=50, metadata={"help": "Documents that a domain holds out for evaluation."})
    text_column: str = field(default="text", metadata={"help": "Where documents have their text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row of the training data."})


_NOT_FOR_USERS = {  # what PEFT or this package fills in; `revision` is written behind the hub's id
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "save_embedding_layers", "experts"),
}


def _stitch_options() -> type[Any]:
    """The options of `StitchConfig` that users set, as a dataclass."""
    types = get_type_hints(StitchConfig)
    chosen = [f for f in dataclasses.fields(StitchConfig) if f.name not in _NOT_FOR_USERS and f.init]
    fields = [(f.name, types[f.name], field(default=f.default, metadata=dict(f.metadata))) for f in chosen]
    return dataclasses.make_dataclass("StitchOptions", fields, namespace={"_argument_group_name": "stitches"})


StitchOptions = _stitch_options()


@dataclass
class TrainingOptions(TrainingArguments):
    """Those of transformers, with an evaluation before the first step, whose losses the card shows."""

    _argument_group_name = "training, as transformers.TrainingArguments"

    output_dir: str = field(
        default="", metadata={"help": "The adapter's folder, which also holds checkpoints.", "metavar": "FOLDER"}
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    resume_from_checkpoint: Optional[str] = field(
        default=None, metadata={"help": "A checkpoint to go on from. Default: the last one in output_dir, if any."}
    )


GROUPS: Any = (ModelOptions, DataOptions, StitchOptions, TrainingOptions)
