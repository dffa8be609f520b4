"""How long a token takes with one model per device, by what connects the devices: a model on paper, and its check.

    python -m benchmarks.links            # the tables of docs/distributed.md
    python -m benchmarks.links --check    # two gloo processes on this machine against the same formula

What is assumed of a step that decodes one sequence:

- a device reads all weights of its model once, at the bandwidth of its memory, and does nothing else that counts;
- at each of the K stitches, every device gets the states of all models (`expert_parallel` exchanges them in one
  all-gather): the latency of the link, and the bytes of the other models' states at its bandwidth;
- logits of the first device go to all others: once more the same, with the vocabulary's size;
- the stitches' own products, an `experts_into_hub` gate and projection per model, are read from memory as well;
- nothing overlaps: no device computes while it waits.
"""

import argparse
import time
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.distributed as dist

from peft_bts.distributed.processes import Processes

from .reporting import table
from .speed_parts.processes import PROCESSES, free_port


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
    """Seconds of an all-gather to which every device brings `sent` bytes."""
    return link.latency + (devices - 1) * sent / link.bandwidth


def spread_token(models: Models, link: Link) -> float:
    """Seconds of a token with one model per device."""
    stitches = models.stitches * (2 * models.number - 1) * models.width**2 * models.bytes
    reading = (models.parameters * models.bytes + stitches) / MEMORY
    states = models.stitches * exchange(models.width * models.bytes, link, models.number)
    return reading + states + exchange(models.vocabulary * models.bytes, link, models.number)


def one_process_token(models: Models) -> float:
    """Seconds of a token where the models run one after the other, each on memory of the same bandwidth."""
    stitches = models.stitches * (2 * models.number - 1) * models.width**2 * models.bytes
    return (models.number * models.parameters * models.bytes + stitches) / MEMORY


def on_paper() -> str:
    rows = []
    for models in MODELS:
        alone = one_process_token(models)
        rows.append([models.name, "one process, or `device_map`", f"{alone * 1e3:.1f}", "1.00", ""])
        for link in LINKS:
            token = spread_token(models, link)
            waiting = token - spread_token(models, Link("", 0.0, float("inf")))
            rows.append(["", link.name, f"{token * 1e3:.1f}", f"{token / alone:.2f}", f"{waiting / token:.0%}"])
    return table(["models", "link", "ms per token", "of one process", "of it exchange"], rows)


# --- The check ------------------------------------------------------------------------------------------------------

_SIZES = (2**10, 2**22)  # bytes: what latency and bandwidth are taken from
_TESTED = (2**13, 2**16, 2**19)  # what they are to predict


def check() -> str:
    """Exchanges of this machine's processes, and what the formula says of them."""
    context, address = get_context("spawn"), f"tcp://localhost:{free_port()}"
    mine, theirs = context.Pipe()
    started = [
        context.Process(target=_measure, args=(rank, address, theirs if rank == 0 else None))
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    seconds: dict[int, float] = mine.recv()
    for process in started:
        process.join()
    small, large = _SIZES
    bandwidth = (large - small) / (seconds[large] - seconds[small])
    link = Link("gloo on this machine", seconds[small] - small / bandwidth, bandwidth)
    rows = [
        [f"{size:,}", f"{seconds[size] * 1e6:.0f}", f"{exchange(size, link, PROCESSES) * 1e6:.0f}"] for size in _TESTED
    ]
    head = f"{link.name}: latency {link.latency * 1e6:.0f} us, {link.bandwidth / 1e9:.2f} GB/s.\n\n"
    return head + table(["bytes per process", "measured, us", "by the formula, us"], rows)


def _measure(rank: int, address: str, end) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    processes = Processes(dist.group.WORLD, range(PROCESSES))
    seconds = {}
    for size in (*_SIZES, *_TESTED):
        states = [torch.zeros(size, dtype=torch.uint8) for _ in range(PROCESSES)]
        times = []
        for _ in range(30):
            start = time.perf_counter()
            processes.from_owners(states, range(PROCESSES), [torch.uint8] * PROCESSES)
            times.append(time.perf_counter() - start)
        seconds[size] = sorted(times)[len(times) // 2]
    if end is not None:
        end.send(seconds)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the formula with two processes of this machine")
    print(check() if parser.parse_args().check else on_paper())


if __name__ == "__main__":
    main()
