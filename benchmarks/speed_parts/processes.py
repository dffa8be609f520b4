"""Models spread over processes: two processes of one thread each against one of two threads."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peft_bts
from peft_bts import StitchConfig
from peft_bts.config import stitch_schedule

from ..measuring import set_up
from ..random_models import Case, bytes_of, models, token_ids
from . import traffic
from .presets import Preset
from .rows import Rows, decoding, sequences, turns
from .runners import Forward, TrainingStep, alone


PROCESSES = 2


def processes(preset: Preset, case: Case) -> Rows:
    """`expert_parallel()`: two processes, of one thread each on a CPU (gloo), on a GPU each with its own (nccl),
    against one process with two threads, or one GPU. Bytes are what both processes together send per token: counted,
    by formula, and as the network interface has counted them, with all protocols (Linux, gloo); and what FSDP would
    send by formula (`traffic.py`, which `python -m benchmarks.links --check` compares with FSDP2)."""
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


@contextmanager
def two_processes(case: Case, work: Callable, ids: torch.Tensor) -> Iterator[Callable[[str], list]]:
    """Two processes that load a stitched model together, and do some work; yields how to ask both of them."""
    from .fresh import save_checkpoints

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
        yield ask


def traffic_of(ask: Callable[[str], list]) -> dict[str, int]:
    """What both processes send in one run: as they have counted it, and on the wire; the latter only on Linux."""
    before = on_the_wire()
    ask("run")
    return {"wire": on_the_wire() - before, "counted": sum(ask("bytes"))}


def in_processes(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    if case.device.startswith("cuda") and torch.cuda.device_count() < PROCESSES:
        return {"left_out": f"needs {PROCESSES} GPUs"}
    ids = token_ids(case, batch, length)
    with two_processes(case, work, ids) as ask:
        ask("run")  # what the first run alone takes
        sent, spread = traffic_of(ask), spread_of(case, ask)
        model, hub, experts = models(case)
        units = {"one process": work([model], ids)}
        if work is not TrainingStep:
            units["E"] = work(alone(hub, experts), ids)
        result = turns(preset, {"two processes": lambda: max(ask("run"))}, units)
        weights = bytes_of(model)
        # All tokens of a run, and those of one forward; FSDP gathers weights anew for each decoded token.
        tokens, at_once = (batch * length,) * 2
        if work not in (Forward, TrainingStep):
            tokens, at_once = batch * (length + preset.tokens), batch
        if work is TrainingStep:
            trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            formula, fsdp = traffic.in_training(spread), traffic.fsdp_training(weights, trained, PROCESSES)
        else:
            formula, fsdp = traffic.without_gradients(spread), traffic.fsdp_forward(weights, PROCESSES)
        return result | {
            "sent_per_token": sent["counted"] / tokens,
            "formula_per_token": formula,
            **({"wire_per_token": sent["wire"] / tokens} if sent["wire"] else {}),
            "fsdp_per_token": fsdp / at_once,
        }


def on_the_wire() -> int:
    """Bytes that the loopback interface has sent so far; 0 where there is none of that name."""
    counted = psutil.net_io_counters(pernic=True).get("lo")
    return 0 if counted is None else counted.bytes_sent


def spread_of(case: Case, ask: Callable[[str], list]) -> traffic.Spread:
    """A case over the processes that can be asked."""
    config = StitchConfig(num_stitches=case.stitches, output="hub")
    return traffic.Spread(
        width=case.width,
        schedule=[*stitch_schedule(config, case.layers).values()],
        experts=ask("placement")[0],
        processes=PROCESSES,
        state_bytes=getattr(torch, case.dtype).itemsize,
        stitch_bytes=getattr(torch, case.stitch_dtype).itemsize,
    )


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
            assert what == "placement"
            parallel = model.base_model._parallel
            end.send([parallel.owner(expert) for _, expert in sorted(model.base_model.experts["default"].items())])
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
