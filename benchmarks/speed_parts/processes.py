"""Models spread over processes: two processes of one thread each against one of two threads."""

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peft_bts

from ..measuring import Peak, set_up
from ..random_models import Case, bytes_of, models, token_ids
from .presets import Preset
from .rows import Rows, decoding, sequences, turns
from .runners import Forward, TrainingStep, alone


PROCESSES = 2


def processes(preset: Preset, case: Case) -> Rows:
    """`expert_parallel()`: two processes, of one thread each on a CPU (gloo), on a GPU each with its own (nccl),
    against one process with two threads, or one GPU. Bytes are what one process sends to the other per token, and
    those that FSDP would by formula: for every forward, the other process's half of all weights."""
    for batch in preset.decode:
        yield f"decode, {sequences(batch)}", in_processes, preset, case, decoding(preset), batch, preset.prompt
    batch, length = preset.prefill[0]
    yield f"prefill, {batch} x {length} tokens", in_processes, preset, case, Forward, batch, length
    yield (
        "training step, {} x {} tokens".format(*preset.training),
        in_processes,
        preset,
        case,
        TrainingStep,
        *(preset.training),
    )


SECTIONS = {"processes": ("Models over processes", processes)}


def in_processes(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    from .fresh import save_checkpoints

    if case.device.startswith("cuda") and torch.cuda.device_count() < PROCESSES:
        return {"left_out": f"needs {PROCESSES} GPUs"}
    ids = token_ids(case, batch, length)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_checkpoints(case, Path(folder))
        context, address = get_context("spawn"), f"tcp://localhost:{free_port()}"
        ends = []
        for rank in range(PROCESSES):
            mine, theirs = context.Pipe()
            arguments = (rank, address, folder, case, work, ids, theirs)
            process = context.Process(target=worker, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join, 60)
            ends.append(mine)

        def ask(what: str) -> list:
            for end in ends:
                end.send(what)
            return [end.recv() for end in ends]

        stack.callback(lambda: [end.send("end") for end in ends])
        ask("run")  # what the first run alone takes; so there is a row of memory, too
        sent = max(ask("bytes"))
        model, hub, experts = models(case)
        units = {"one process": work([model], ids)}
        if work is not TrainingStep:
            units["E"] = work(alone(hub, experts), ids)
        result = turns(preset, {"two processes": lambda: max(ask("run"))}, units)
        memory = ask("memory")
        watched = Peak(case.device)
        units["one process"]()
        tokens = batch * preset.tokens if work not in (Forward, TrainingStep) else batch * length
        weights = bytes_of(model)
        passes = preset.tokens if work not in (Forward, TrainingStep) else 2 if work is TrainingStep else 1
        return result | {
            "sent_per_token": sent / tokens,
            "fsdp_per_token": passes * weights / PROCESSES / tokens,
            "peak_bytes": max(held + rise for held, rise in memory),
            "one_process_bytes": weights + watched.rise(),
        }


def worker(rank: int, address: str, folder: str, case: Case, work: Callable, ids: torch.Tensor, end) -> None:
    """One of the processes: loads its models, then does what it is asked to."""
    set_up(1)
    cuda = case.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=rank, world_size=PROCESSES)
    device = f"cuda:{rank}" if cuda else "cpu"
    with peft_bts.expert_parallel():
        hub = AutoModelForCausalLM.from_pretrained(
            f"{folder}/hub", dtype=getattr(torch, case.dtype), device_map=device
        )
        model = PeftModel.from_pretrained(hub, f"{folder}/adapter", is_trainable=work is TrainingStep)
    run = work([model], ids.to(device))
    exchange = model.base_model._parallel.processes
    sent = 0
    while (what := end.recv()) != "end":
        if what == "run":
            before = exchange.bytes_sent
            end.send(run())
            sent = exchange.bytes_sent - before
        elif what == "bytes":
            end.send(sent)
        else:
            watched = Peak(device)
            run()
            end.send((bytes_of(model), watched.rise()))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
