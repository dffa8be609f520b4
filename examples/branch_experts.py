"""Branch and train: experts from one seed, each by continued training on a domain of its own.

    python examples/branch_experts.py \
        --seed_model org/seed --branches code math --output_dir experts \
        --dataset code='src/*.py':8 math=math.jsonl:8 general=org/corpus:2 \
        --max_steps 10000 --per_device_train_batch_size 8 --learning_rate 1e-5 --bf16

makes experts/code and experts/math. A dataset with the name of a branch belongs to that branch alone; the others go to
every branch, so that an expert forgets less of what the seed knew: here, each expert sees 80% of its own domain.

The branches know nothing of each other. They are trained one after another, in a process each; `--only code` trains
one of them, on a machine of its own, and under `accelerate launch` on several GPUs:

    accelerate launch --num_processes 4 examples/branch_experts.py ...the same... --only code
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Optional

from common import DataArguments, PackingArguments, check_block_size, load_domains, pack, parse_datasets
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class BranchArguments:
    seed_model: str = field(metadata={"help": "the model that all experts start from: an id or a path"})
    branches: list[str] = field(metadata={"help": "names of the experts to make, each also that of its dataset"})
    only: Optional[str] = field(default=None, metadata={"help": "train this branch only, in this process"})
    dtype: str = field(default="float32", metadata={"help": "of the weights in training and in the saved expert"})


def main() -> None:
    parser = HfArgumentParser((BranchArguments, DataArguments, PackingArguments, TrainingArguments))
    arguments, data, packing, training = parser.parse_args_into_dataclasses()
    branch, names = arguments.only, parse_datasets(data.dataset)
    missing = {*arguments.branches, branch or arguments.branches[0]} - set(names)
    if missing:
        raise ValueError(f"Every branch needs a --dataset of its name; there is none for {sorted(missing)}.")
    if branch is None:
        for branch in arguments.branches:
            code = subprocess.run([sys.executable, *sys.argv, "--only", branch]).returncode
            if code != 0:  # what went wrong, the process has said itself
                sys.exit(f"Branch {branch!r} was not trained (exit code {code}): see above.")
        return

    others = set(arguments.branches) - {branch}
    data = replace(data, dataset=[value for value in data.dataset if value.partition("=")[0] not in others])
    training = replace(training, output_dir=os.path.join(training.output_dir, branch))
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.seed_model)
    model = AutoModelForCausalLM.from_pretrained(arguments.seed_model, dtype=arguments.dtype)
    check_block_size(packing.block_size, model)
    with training.main_process_first(desc="packing"):  # the others find its work in the cache
        mix, held_out = load_domains(data, partial(pack, tokenizer=tokenizer, arguments=packing))
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=mix,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        processing_class=tokenizer,  # saved beside the weights: stitching compares tokenizers
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint == "last" or training.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics(branch, trainer.evaluate())


if __name__ == "__main__":
    main()
