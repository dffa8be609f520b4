"""Trains tiny stitched models through accelerate: what the processes of test_distributed.py run.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/distributed_training.py OUTPUT SCENARIO...

Every scenario writes `OUTPUT/SCENARIO`: the adapter, and `result.pt` with the losses, the global batches' mean losses
in order, and the logits of the trained model. `train` also runs in one process, for the expected values.
"""

import gc
import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from conftest import randomize
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from zoo import tiny_model

from peft import get_peft_model
from peft_bts import StitchConfig


STEPS, BATCH = 4, 4
DATA = torch.randint(3, 64, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))
OTHER = {"b": {"arch": "gpt2", "layers": 3, "width": 48}}  # architecture, depth and width of its own

SCENARIOS = {
    "plain": {},
    "experts_into_hub": {"pattern": "experts_into_hub"},
    "checkpointing": {"use_reentrant": False},
    "checkpointing_reentrant": {"use_reentrant": True},
    "projected": {"expert_streams": "projected", "same": True},
    "low_rank": {"gate": "token", "r": 4},
    "bloom": {"hub": "bloom"},
    "trainer": {"trainer": True},
    "trainer_checkpointing": {"trainer": True, "use_reentrant": False},
    "tied": {"tied": True},
}


def build(hub="llama", same=False, tied=False, **config):
    """A stitched model with random stitches, its experts of the hub's architecture and of another."""
    options = {"tie_word_embeddings": tied} if hub == "llama" else {}
    model = get_peft_model(tiny_model(hub, **options), StitchConfig(task_type="CAUSAL_LM", **config))
    model.attach_expert("a", tiny_model(hub, layers=4 if same else 6, seed=1, **options))
    model.attach_expert("b", tiny_model("llama" if same else "gpt2", layers=3, width=32 if same else 48, seed=2))
    return randomize(model).train()


def train(folder, trainer=False, use_reentrant=None, **options):
    checkpointing = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    (train_with_trainer if trainer else train_with_accelerate)(folder, checkpointing, options)


def train_with_accelerate(folder, checkpointing, options):
    """A plain loop: half of it, a checkpoint, and the other half with new objects that resume from it."""
    losses = []
    for half in range(2):
        model = build(**options)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        accelerator = start_accelerator()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = DataLoader(DATA, batch_size=BATCH // accelerator.num_processes)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if half:
            accelerator.load_state(f"{folder}/state")
        for step, batch in enumerate(loader):
            if step // (STEPS // 2) != half:
                continue
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            check_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()[None]).mean().item())
        if not half:
            accelerator.save_state(f"{folder}/state")
    state = accelerator.get_state_dict(model)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=DATA[:BATCH]).logits
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
        torch.save({"losses": losses, "logits": logits}, f"{folder}/result.pt")
    accelerator.wait_for_everyone()


def check_gradients(model):
    """All stitch weights have a gradient, and no other weight."""
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    stitches = {name for name, _ in model.named_parameters() if ".stitch_layer." in name}
    assert with_gradient == stitches, with_gradient ^ stitches


def start_accelerator():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if "RANK" in os.environ:
        PartialState(cpu=True)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # accelerate shards models on accelerators only, though its code is the same for CPUs.
            PartialState().distributed_type = DistributedType.MULTI_GPU
    return Accelerator()


def main():
    torch.set_num_threads(1)
    output, *scenarios = sys.argv[1:]
    for name in scenarios:
        print("==", name, flush=True)
        train(f"{output}/{name}", **SCENARIOS[name])
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
