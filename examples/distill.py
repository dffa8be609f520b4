"""Distil a stitched model into one model: its hub learns to say what all of them say together.

    python examples/distill.py --adapter my-stitch \
        --dataset code='src/*.py':15 math=math.jsonl:15 general=org/corpus:70 \
        --output_dir my-student --max_steps 7000 --per_device_train_batch_size 8 --bf16 \
        --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 200

The student starts as the hub, or as the model that `--student` names, of the same tokenizer. On documents of all
domains, the loss is the Kullback-Leibler divergence from what the stitched model says of each next token.
`--data_weight 0.5` takes half of it from the documents' own next tokens; 1 is plain training on them, without a
teacher, for comparison. What comes out is a model like the hub, and as fast, without stitches or experts.

The evaluation is the student's loss on rows held out from each domain: `eval_code_loss` and so on.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import DataArguments, PackingArguments, check_block_size, load_domains, pack
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peft_bts  # noqa: F401  # registers the method


@dataclass
class DistillArguments:
    adapter: str = field(metadata={"help": "the stitched model that teaches: an id or a folder"})
    student: str = field(default="", metadata={"help": "who learns: an id or a path [the adapter's hub]"})
    data_weight: float = field(default=0.0, metadata={"help": "share of the documents' own next tokens in the loss"})
    dtype: str = field(default="auto", metadata={"help": "of the teacher; the student's is float32, which is trained"})

    def __post_init__(self) -> None:
        if not 0 <= self.data_weight <= 1:
            raise ValueError(f"--data_weight {self.data_weight} is a share, from 0 to 1.")


class DistillTrainer(Trainer):
    """A Trainer whose model learns what a teacher says.

    Args:
        teacher: The stitched model; not trained.
        data_weight: Share of the loss on the labels; the rest is the divergence from the teacher.
    """

    def __init__(self, *args: Any, teacher: PeftModel, data_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.data_weight = data_weight
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps are averaged

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Of a row of training, the mixed loss; of evaluation, that of the labels, which can be compared."""
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training and self.data_weight < 1:
            with torch.no_grad():
                taught = self.teacher(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
            divergence = divergence_from(taught.logits, outputs.logits, inputs["labels"])
            loss = self.data_weight * loss + (1 - self.data_weight) * divergence
        return (loss, outputs) if return_outputs else loss


def divergence_from(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """KL(teacher || student) in nats, the mean over tokens that have a next one with a label other than -100."""
    predicts = labels_BT[:, 1:] != -100
    student, teacher = (logits[:, :-1][predicts].float().log_softmax(-1) for logits in (student_BTV, teacher_BTV))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def main() -> None:
    parser = HfArgumentParser((DistillArguments, DataArguments, PackingArguments, TrainingArguments))
    names, data, packing, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)

    teacher = AutoPeftModelForCausalLM.from_pretrained(names.adapter, dtype=names.dtype)
    config = PeftConfig.from_pretrained(names.adapter)
    hub, revision = config.base_model_name_or_path, config.revision
    tokenizer = AutoTokenizer.from_pretrained(hub, revision=revision)
    source = {"pretrained_model_name_or_path": names.student or hub, "revision": None if names.student else revision}
    student = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    check_block_size(packing.block_size, teacher)
    with training.main_process_first(desc="packing"):
        mix, held_out = load_domains(data, partial(pack, tokenizer=tokenizer, arguments=packing))

    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        data_weight=names.data_weight,
        args=training,
        train_dataset=mix,
        eval_dataset=held_out,
        data_collator=default_data_collator,  # packed rows need no padding
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint == "last" or training.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
