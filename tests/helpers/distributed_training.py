r"""Trains tiny stitched models through accelerate: the script that test_distributed.py launches.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml \
        tests/helpers/distributed_training.py FOLDER SCENARIO...

`FOLDER/models` holds the hubs and experts (`save_models`). Every scenario trains over the same global batches,
whatever the number of processes, is interrupted half-way and resumed by new objects, and writes into
`FOLDER/SCENARIO` the adapter and `result.pt`: the losses of all steps, and the logits of the trained model while it
is still distributed.
"""

import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from peft_bts import StitchConfig
from tests.helpers.models import randomize
from tests.helpers.zoo import tiny_model


STEPS, BATCH = 4, 4
DATA = torch.randint(3, 64, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))
DISTRIBUTED = "RANK" in os.environ

MODELS = {
    "llama": ("llama", {}),
    "deeper": ("llama", {"layers": 6, "seed": 1}),
    "other": ("gpt2", {"layers": 3, "width": 48, "seed": 2}),  # architecture, depth and width of its own, tied head
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bloom": ("bloom", {}),
}

# Arguments of `train`.
SCENARIOS = {
    "alternating": {},
    "experts_into_hub": {"pattern": "experts_into_hub"},
    "checkpointing": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "token_gates": {"gate": "token", "r": 4},
    "mixture": {"output": "mixture"},
    "output_gates": {"output": "mixture", "num_stitches": 0},
    "mixture_checkpointing": {"output": "mixture", "use_reentrant": False},
    "tied": {"hub": "tied"},
    "bloom": {"hub": "bloom"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora": {"experts": ("lora", "other")},
    "trainer": {"trainer": True},
    "trainer_checkpointing": {"trainer": True, "use_reentrant": False},
    "ddp": {"environment": {"ACCELERATE_USE_FSDP": "false"}},  # for launches with fsdp2.yaml
    "fsdp_arguments": {"trainer": True, "fsdp_config": {}},  # for launches with ddp.yaml
    "sharded_checkpoint": {"environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}},
    "rank_0_loads": {"environment": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}},
    "fsdp_checkpointing": {"environment": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}},
    "bf16": {"environment": {"ACCELERATE_MIXED_PRECISION": "bf16"}},
}


def save_models(folder):
    for name, (arch, options) in MODELS.items():
        tiny_model(arch, **options).save_pretrained(f"{folder}/models/{name}")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(f"{folder}/models/llama"), lora).save_pretrained(
        f"{folder}/models/lora"
    )


def build(models, hub="llama", experts=("deeper", "other"), **config):
    """A stitched model with random stitches, the same in every process."""
    torch.manual_seed(0)
    config = StitchConfig(task_type="CAUSAL_LM", experts={x: f"{models}/models/{x}" for x in experts}, **config)
    return randomize(get_peft_model(AutoModelForCausalLM.from_pretrained(f"{models}/models/{hub}"), config)).train()


def train(folder, name, models=None, trainer=False, use_reentrant=None, environment=None, fsdp_config=None, **options):
    checkpointing = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    options["models"] = models or folder
    before = dict(os.environ)
    os.environ.update(environment if environment and DISTRIBUTED else {})
    try:
        if trainer:
            train_with_trainer(folder, name, checkpointing, fsdp_config if DISTRIBUTED else None, options)
        else:
            train_with_accelerate(folder, name, checkpointing, options)
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset()


def train_with_accelerate(folder, name, checkpointing, options):
    """A plain loop: the first half of it, a checkpoint, and the other half with new objects that load it."""
    losses, state = [], f"{folder}/{name}/state"
    for half in range(2):
        reset()
        PartialState(cpu=True)
        shard_on_cpu(os.environ.get("ACCELERATE_USE_FSDP") == "true")
        model = build(**options)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        accelerator = Accelerator()  # not before: with ZeRO-3 it has models loaded in parts
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        loader = DataLoader(DATA, batch_size=BATCH // accelerator.num_processes)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if half:
            accelerator.load_state(state)
        for step, batch in enumerate(loader):
            if step // (STEPS // 2) != half:
                continue
            loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
            accelerator.backward(loss)
            if accelerator.distributed_type != DistributedType.DEEPSPEED:  # which takes the gradients away at once
                check_gradients(model)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as DeepSpeed does by default, and Trainer
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()[None]).mean().item())
        if not half:
            accelerator.save_state(state)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(f"{folder}/{name}", state_dict=weights)
    finish(folder, name, accelerator, model, losses)


def train_with_trainer(folder, name, checkpointing, fsdp_config, options):
    """The same with Trainer: a run over all steps that saves half-way, and one that resumes from there."""
    losses, output = [], f"{folder}/{name}/trainer"
    for resume in (False, True):
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
            learning_rate=1e-2,
            adam_epsilon=1e-4,
            gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs=checkpointing,
            save_steps=STEPS // 2,
            logging_steps=1,
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **({} if fsdp_config is None else {"fsdp": True, "fsdp_config": dict(fsdp_config)}),
        )
        shard_on_cpu(fsdp_config is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true")
        model = build(**options)
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in DATA])
        trainer.train(resume_from_checkpoint=f"{output}/checkpoint-{STEPS // 2}" if resume else None)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    trainer.save_model(f"{folder}/{name}")
    assert losses[0] == losses[1], losses
    finish(folder, name, trainer.accelerator, trainer.model_wrapped, losses[1])


def finish(folder, name, accelerator, model, losses):
    dtensor = torch.distributed.tensor.DTensor
    sharded = {key: isinstance(p, dtensor) for key, p in model.named_parameters()}  # now: a forward gathers some
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=DATA[:BATCH], attention_mask=torch.ones_like(DATA[:BATCH])).logits
    if accelerator.is_main_process:
        result = {"losses": losses, "logits": logits, "kind": str(accelerator.distributed_type), "sharded": sharded}
        torch.save(result, f"{folder}/{name}/result.pt")
    accelerator.wait_for_everyone()


def check_gradients(model):
    """All stitch weights have a gradient, and no other weight has one."""
    trained = (".stitch_layer.", ".stitch_output.", ".modules_to_save.")
    for key, parameter in model.named_parameters():
        if (parameter.grad is not None) != any(part in key for part in trained):
            raise AssertionError(f"{key}: gradient {parameter.grad is not None}")


def reset():
    """Let the next scenario begin as a script of its own would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def shard_on_cpu(sharded):
    """accelerate offers FSDP on accelerators only; what it does then is the same on CPUs."""
    if sharded and DISTRIBUTED:
        PartialState().distributed_type = DistributedType.MULTI_GPU


def main():
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    for name in names:
        if os.environ["RANK"] == "0":
            print("scenario", name, flush=True)
        train(folder, name, **SCENARIOS[name])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
