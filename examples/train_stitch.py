"""Train the stitches between a seed model and its experts, with Trainer, as one trains a LoRA.

    python examples/train_stitch.py \
        --hub org/seed --expert code=org/seed-code math=org/seed-math@v2 \
        --dataset code='src/*.py':15 math=math.jsonl:15 general=org/corpus:70 \
        --output_dir my-stitch --max_steps 7000 --per_device_train_batch_size 8 --bf16 \
        --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 200 \
        --eval_strategy steps --eval_steps 500 --save_steps 500

On several GPUs:

    accelerate launch --num_processes 4 examples/train_stitch.py ...the same...

The evaluation is of each domain, on rows held out from it: `eval_code_loss` and so on. The logs have the mean gates of
every stitch, too. All options of `StitchConfig` can be set (`--num_stitches 6 --gate token`), and all of
`TrainingArguments`. `--resume_from_checkpoint last` goes on with a run that was cut off. The adapter's folder is
`--output_dir`, for `AutoPeftModelForCausalLM.from_pretrained`.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from common import DataArguments, PackingArguments, check_block_size, load_domains, pack, parse_experts
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_bts import GateLogger, StitchConfig


@dataclass
class ModelArguments:
    hub: str = field(metadata={"help": "the seed model: an id (of `--revision`) or a path"})
    expert: list[str] = field(metadata={"action": "extend", "help": "name=id_or_path[@revision], for each expert"})
    dtype: str = field(default="auto", metadata={"help": "of seed and experts; stitches are float32"})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, PackingArguments, StitchConfig, TrainingArguments))
    names, data, packing, config, training = parser.parse_args_into_dataclasses()
    config = replace(config, task_type="CAUSAL_LM", experts=parse_experts(names.expert))
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(names.hub, revision=config.revision)
    hub = AutoModelForCausalLM.from_pretrained(names.hub, revision=config.revision, dtype=names.dtype)
    model = get_peft_model(hub, config)
    model.print_trainable_parameters()
    check_block_size(packing.block_size, model)
    with training.main_process_first(desc="packing"):  # the others find its work in the cache
        mix, held_out = load_domains(data, partial(pack, tokenizer=tokenizer, arguments=packing))

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=mix,
        eval_dataset=held_out,
        data_collator=default_data_collator,  # packed rows need no padding
        processing_class=tokenizer,  # saved beside the adapter
        callbacks=[GateLogger()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint == "last" or training.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
