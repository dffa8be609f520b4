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
told otherwise: `--model_init_kwargs '{"dtype": "bfloat16"}'`.
"""

from dataclasses import dataclass, field, replace

from common import DataArguments, load_domains, parse_experts
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from peft_bts import GateLogger, StitchConfig


@dataclass
class ModelArguments:
    hub: str = field(metadata={"help": "the seed model: an id (of `--revision`) or a path"})
    expert: list[str] = field(metadata={"action": "extend", "help": "name=id_or_path[@revision], for each expert"})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, StitchConfig, SFTConfig))
    names, data, config, training = parser.parse_args_into_dataclasses()
    if config.revision is not None:
        training.model_init_kwargs = {**(training.model_init_kwargs or {}), "revision": config.revision}
    mix, held_out = load_domains(data)
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
