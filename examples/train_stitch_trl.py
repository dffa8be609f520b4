"""Train the stitches between a seed model and its experts with TRL's SFTTrainer: a `StitchConfig` is a `peft_config`.

    python examples/train_stitch_trl.py \
        --hub org/seed --expert code=org/seed-code math=org/seed-math@v2 \
        --dataset code=code.jsonl:15 math=math.jsonl:15 general=org/chats:70 \
        --output_dir my-stitch --max_steps 7000 --per_device_train_batch_size 8 --learning_rate 1e-4 \
        --max_length 2048 --packing --eval_strategy steps --eval_steps 500

Several GPUs: `accelerate launch --num_processes 4 examples/train_stitch_trl.py ...the same...`.

The rows of all domains have the same columns, one of TRL's kinds: `text`; `prompt` and `completion`, where the loss is
the completion's; or `messages`, where `--assistant_only_loss` leaves out what the user says. All options of
`StitchConfig` and of TRL's `SFTConfig` can be set. TRL loads the seed in float32, and the experts follow it, unless
told otherwise: `--model_init_kwargs '{"dtype": "bfloat16"}'`. TRL trains in bf16 by default; on a CPU, say
`--use_cpu --bf16 False`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from common import DataArguments, load_domains, parse_experts
from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from peft_bts import GateLogger, StitchConfig


@dataclass
class ModelArguments:
    hub: str = field(metadata={"help": "the seed model: an id (of `--revision`) or a path"})
    expert: list[str] = field(metadata={"action": "extend", "help": "name=id_or_path[@revision], for each expert"})


def one_kind() -> Callable[[Dataset], Dataset]:
    """What looks at the rows of one domain after the other, and raises `ValueError` if they are of several kinds."""
    seen: list[str] = []

    def check(rows: Dataset) -> Dataset:
        kind = next((kind for kind in ("messages", "prompt", "text") if kind in rows.column_names), None)
        if kind is None:
            raise ValueError(f"--dataset: expected rows with one of TRL's kinds, as above; found {rows.column_names}.")
        seen.append(kind)
        if len(set(seen)) > 1:
            raise ValueError(
                f"--dataset: the rows of all domains must be of one kind; one has {seen[0]!r}, another {kind!r}. "
                "Write texts as `prompt` and `completion`, or as `messages`, too."
            )
        return rows

    return check


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, StitchConfig, SFTConfig))
    try:
        names, data, config, training = parser.parse_args_into_dataclasses()
    except ValueError as error:
        raise ValueError(f"{error} (TRL's default is --bf16 True: on a CPU, say --use_cpu --bf16 False.)") from error
    if config.revision is not None:
        training.model_init_kwargs = {**(training.model_init_kwargs or {}), "revision": config.revision}
    mix, held_out = load_domains(data, one_kind())
    trainer = SFTTrainer(
        model=names.hub,
        args=training,
        train_dataset=mix,
        eval_dataset=held_out,
        peft_config=replace(config, task_type="CAUSAL_LM", experts=parse_experts(names.expert)),
        callbacks=[GateLogger()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint == "last" or training.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
