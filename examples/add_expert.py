"""Give a trained stitch adapter one more expert, and show what it learns and what is kept.

    python examples/add_expert.py \
        --adapter my-stitch --expert law=org/seed-law --init hub --new_steps 500 \
        --dataset code='src/*.py' math=math.jsonl general=org/corpus law=law.jsonl \
        --output_dir my-stitch-law --max_steps 1000 --per_device_train_batch_size 8 --learning_rate 1e-4 --bf16

First only the new expert's stitch weights are trained, for `--new_steps`; the others stay bitwise as they were. Then
all stitch weights are trained, as `TrainingArguments` say. The table has the loss of each domain, on held-out rows,
before the new expert came, right after it was attached, and after each phase. `--output_dir` gets the adapter of the
second phase, its folder `new-weights` that of the first.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from common import DataArguments, PackingArguments, check_block_size, load_domains, pack, parse_experts
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from peft_bts import ExpertsIntoHub, HubIntoExperts


@dataclass
class AddArguments:
    adapter: str = field(metadata={"help": "the trained stitch adapter: an id or a path"})
    expert: str = field(metadata={"help": "the new expert, name=id_or_path[@revision]"})
    init: str = field(default="hub", metadata={"help": "start of its gates", "choices": ["zero", "hub", "closed"]})
    new_steps: int = field(default=200, metadata={"help": "steps in which only its weights are trained"})


def weights_of(model: PeftModel, expert: str) -> Iterator[nn.Parameter]:
    """The stitch weights of one expert: a gate and a projection in every stitch."""
    for module in model.modules():
        if isinstance(module, (ExpertsIntoHub, HubIntoExperts)):
            yield from module.gate.of(expert).parameters()
            yield from module.proj.of(expert).parameters()


def main() -> None:
    parser = HfArgumentParser((AddArguments, DataArguments, PackingArguments, TrainingArguments))
    arguments, data, packing, training = parser.parse_args_into_dataclasses()
    ((name, reference),) = parse_experts([arguments.expert]).items()
    set_seed(training.seed)

    model = AutoPeftModelForCausalLM.from_pretrained(arguments.adapter, is_trainable=True)
    config = model.active_peft_config
    tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    check_block_size(packing.block_size, model)
    with training.main_process_first(desc="packing"):
        mix, held_out = load_domains(data, partial(pack, tokenizer=tokenizer, arguments=packing))

    def trainer_with(training: TrainingArguments) -> Trainer:
        return Trainer(
            model=model,
            args=training,
            train_dataset=mix,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            processing_class=tokenizer,
        )

    def losses(trainer: Trainer) -> list[float]:
        metrics = trainer.evaluate()
        return [metrics[f"eval_{domain}_loss"] for domain in held_out]

    first = trainer_with(
        replace(training, max_steps=arguments.new_steps, output_dir=os.path.join(training.output_dir, "new-weights"))
    )
    rows = {"before": losses(first)}
    old_weights = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    model.attach_expert(name, reference, init=arguments.init)
    check_block_size(packing.block_size, model)
    rows["attached"] = losses(first)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    for parameter in weights_of(model, name):
        parameter.requires_grad_(True)
    first.train()
    first.save_model()
    rows["new weights trained"] = losses(first)
    weights = get_peft_model_state_dict(model)
    changed = [key for key, tensor in old_weights.items() if not torch.equal(weights[key], tensor)]
    if changed:
        raise RuntimeError(f"Only the weights of {name!r} should have changed, but so did {changed}.")

    for parameter in trainable:
        parameter.requires_grad_(True)
    second = trainer_with(training)
    second.train()
    second.save_model()
    rows["all weights trained"] = losses(second)

    if training.process_index == 0:
        table = Table("", *held_out, title="Loss by domain")
        for stage, row in rows.items():
            table.add_row(stage, *(f"{loss:.3f}" for loss in row))
        Console().print(table)
        print(f"After the first phase, all {len(old_weights)} old tensors were bitwise what they had been.")


if __name__ == "__main__":
    main()
