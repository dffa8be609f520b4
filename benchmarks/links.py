"""How long a token takes with one model per device, by what connects the devices: a model on paper, and its check.

    python -m benchmarks.links            # the table of docs/distributed.md
    python -m benchmarks.links --check    # two gloo processes on this machine against the same formulas

What is assumed of a step that decodes one sequence:

- a device reads all weights of its model once, at the bandwidth of its memory, and does nothing else that counts;
- at each of the K stitches, the hub's device gets a vector of every other one, or sends one to each: the latency of
  the link, and the bytes of the others' vectors at its bandwidth;
- so it does behind the last stitch with its state, and `generate()` with its logits, of the vocabulary's size;
- stitches are read from memory as well: at Experts-into-Hub a gate per model by the hub's device and a projection by
  an expert's, at Hub-into-Experts a gate and a projection by an expert's;
- nothing overlaps: no device computes while it waits.

The check compares times of exchanges, and bytes: those of a small stitched model over two processes, and those of the
same model under FSDP2, as the network interface has counted them, with the formulas of `speed_parts/traffic.py`.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_bts.distributed.processes import Processes

from .random_models import Case, bytes_of, models, token_ids
from .reporting import table
from .speed_parts import traffic
from .speed_parts.processes import PROCESSES, free_port, on_the_wire, spread_of, traffic_of, two_processes
from .speed_parts.runners import Forward


@dataclass(frozen=True)
class Link:
    name: str
    latency: float  # seconds, of a collective of small tensors
    bandwidth: float  # bytes per second and device


@dataclass(frozen=True)
class Models:
    name: str
    parameters: float
    width: int
    number: int = 4
    vocabulary: int = 128_256
    stitches: int = 4
    bytes: int = 2  # of a weight, and of a number in a state


# Orders of magnitude of what vendors say, and of NCCL's latencies; put in your own.
LINKS = [
    Link("NVLink, one machine", 15e-6, 450e9),
    Link("PCIe 5, one machine", 20e-6, 50e9),
    Link("InfiniBand, 400 Gbit/s", 30e-6, 45e9),
    Link("Ethernet, 100 Gbit/s", 60e-6, 11e9),
    Link("Ethernet, 10 Gbit/s", 100e-6, 1.1e9),
]
MODELS = [Models("4 x 8B", 8e9, 4096), Models("4 x 70B", 70e9, 8192)]
MEMORY = 3.35e12  # bytes per second: an H100's. A model of 70B takes several, here taken for one that is as fast.


def exchange(sent: float, link: Link, devices: int) -> float:
    """Seconds until a device has `sent` bytes of every other one, or they have as many of it."""
    return link.latency + (devices - 1) * sent / link.bandwidth


def spread_token(models: Models, link: Link) -> float:
    """Seconds of a token with one model per device."""
    # Gates at half of the stitches, behind which the hub goes on; experts' two matrices at the others.
    stitches = models.stitches / 2 * (models.number + 2) * models.width**2 * models.bytes
    reading = (models.parameters * models.bytes + stitches) / MEMORY
    states = (models.stitches + 1) * exchange(models.width * models.bytes, link, models.number)
    return reading + states + exchange(models.vocabulary * models.bytes, link, models.number)


def one_process_token(models: Models) -> float:
    """Seconds of a token where the models run one after the other, each on memory of the same bandwidth."""
    stitches = models.stitches * (2 * models.number - 1) * models.width**2 * models.bytes
    return (models.number * models.parameters * models.bytes + stitches) / MEMORY


def on_paper() -> str:
    rows = []
    for size in MODELS:
        alone = one_process_token(size)
        rows.append([size.name, "one process, or `device_map`", f"{alone * 1e3:.1f}", "1.00", ""])
        for link in LINKS:
            token = spread_token(size, link)
            waiting = token - spread_token(size, Link("", 0.0, float("inf")))
            rows.append(["", link.name, f"{token * 1e3:.1f}", f"{token / alone:.2f}", f"{waiting / token:.0%}"])
    return table(["models", "link", "ms per token", "of one process", "of it exchange"], rows)


# --- The check ------------------------------------------------------------------------------------------------------

_SIZES = (2**10, 2**22)  # bytes: what latency and bandwidth are taken from
_TESTED = (2**13, 2**16, 2**19)  # what they are to predict
_ROUNDS = 50  # that count, behind some to warm up


def check() -> str:
    """Exchanges of this machine's processes, and what the formulas say of them."""
    return f"{check_times()}\n\n{check_bytes()}"


def in_two_processes(measure: Callable, *arguments) -> Any:
    """What `measure` returns in the first of two processes of a group."""
    context, address = get_context("spawn"), f"tcp://localhost:{free_port()}"
    mine, theirs = context.Pipe()
    started = [
        context.Process(target=_in_group, args=(rank, address, theirs, measure, arguments))
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    found = mine.recv()
    for process in started:
        process.join()
    return found


def _in_group(rank: int, address: str, end, measure: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    found = measure(*arguments)
    if rank == 0:
        end.send(found)
    dist.barrier()
    dist.destroy_process_group()


def check_bytes() -> str:
    """What a small model sends, by formula and as it was counted."""
    case = Case(width=256, layers=4, heads=4, kv_heads=4, intermediate=512, vocabulary=1024)
    batch, length = 8, 32
    with two_processes(case, Forward, token_ids(case, batch, length)) as ask:
        ask("run")  # in the first run the processes agree on dtypes
        sent, formula = traffic_of(ask), traffic.without_gradients(spread_of(case, ask))
    model, *_ = models(case)
    weights, forwards = bytes_of(model), 4
    sharded = in_two_processes(_sharded_bytes, case, forwards) / forwards
    rows = [
        ["expert parallel, per token", f"{formula:,}", *(f"{sent[k] / batch / length:,.0f}" for k in sent)],
        ["FSDP2, per forward", f"{traffic.fsdp_forward(weights, PROCESSES):,}", f"{sharded:,.0f}", ""],
    ]
    return table(["bytes of both processes", "by formula", "on the wire", "counted by the package"], rows)


def _sharded_bytes(case: Case, forwards: int) -> int:
    """What forwards of a model send that FSDP2 has sharded."""
    model, *_ = models(case)
    mesh, units = init_device_mesh("cpu", (PROCESSES,)), model.base_model._no_split_modules
    for module in reversed(list(model.modules())):  # those inside of others first
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = token_ids(case, 1, 1)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        dist.barrier()
        before = on_the_wire()
        for _ in range(forwards):
            model(input_ids=ids, use_cache=False)
        dist.barrier()
    return on_the_wire() - before


def check_times() -> str:
    """How long exchanges take, and what the formula says."""
    seconds = in_two_processes(_measure)
    small, large = _SIZES
    bandwidth = (large - small) / (seconds[large] - seconds[small])
    link = Link("gloo on this machine", seconds[small] - small / bandwidth, bandwidth)
    rows = [
        [f"{size:,}", f"{seconds[size] * 1e6:.0f}", f"{exchange(size, link, PROCESSES) * 1e6:.0f}"] for size in _TESTED
    ]
    head = f"{link.name}: latency {link.latency * 1e6:.0f} us, {link.bandwidth / 1e9:.2f} GB/s.\n\n"
    return head + table(["bytes per process", "measured, us", "by the formula, us"], rows)


def _measure() -> dict[int, float]:
    """Median seconds of exchanges by size, in which both processes send and receive."""
    processes = Processes(dist.group.WORLD, range(PROCESSES))
    everybody = [range(PROCESSES)] * PROCESSES
    times: dict[int, list[float]] = {size: [] for size in (*_SIZES, *_TESTED)}
    for _ in range(5 + _ROUNDS):  # in turns, since a machine's speed drifts
        for size in times:
            states = [torch.zeros(size, dtype=torch.uint8) for _ in range(PROCESSES)]
            start = time.perf_counter()
            processes.to_readers(states, range(PROCESSES), [torch.uint8] * PROCESSES, everybody)
            processes.await_readers()
            times[size].append(time.perf_counter() - start)
    return {size: median(found[-_ROUNDS:]) for size, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the formula with two processes of this machine")
    print(check() if parser.parse_args().check else on_paper())


if __name__ == "__main__":
    main()
