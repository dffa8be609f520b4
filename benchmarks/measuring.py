"""How every benchmark measures: time by turns, memory in fresh processes."""

import gc
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging


LINUX = sys.platform == "linux"

Runner = Callable[[], float]  # does the work once, and returns the seconds that count


def set_up(threads: int) -> None:
    """Give PyTorch its threads, and let nothing come between the lines of a progress bar."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21, transformers 5.23


# --- Time -----------------------------------------------------------------------------------------------------------


def take_turns(
    runners: dict[str, Runner],
    units: dict[str, Runner],
    *,
    budget: float,
    rounds: tuple[int, int],
    flops: bool = False,
) -> dict[str, Any]:
    """Run all runners round by round, in alternating order, until `budget` seconds are over.

    A machine's speed drifts by more than stitches cost; between two neighbours of one round it hardly does. So every
    round gives a ratio of its own, and the median of those counts.

    Args:
        runners: By name.
        units: By name, too: what the time of each runner is divided by.
        budget: Seconds, after which no new round begins.
        rounds: How many there are at least and at most. Before them comes one to warm up; where that alone takes the
            budget, it is the first of them.
        flops: Count the floating point operations of each runner while warming up, which then never counts.

    Returns:
        `seconds` (medians, by name), `ratios` (by "runner / unit": median and quartiles over rounds), `rounds`; and,
        if asked for, `flops`. Whoever the device has no memory for is named in `out_of_memory`, and left out.
    """
    times: dict[str, list[float]] = {}
    counted, failed = {}, []
    least, most = rounds
    start = time.perf_counter()
    everyone = runners | units
    for name, run in everyone.items():
        counter = FlopCounterMode(display=False)
        try:
            if flops:
                with counter:
                    run()
                counted[name], times[name] = counter.get_total_flops(), []
            else:
                times[name] = [run()]
        except torch.OutOfMemoryError:
            failed.append(name)
            torch.cuda.empty_cache()
    if time.perf_counter() - start < budget:
        times = {name: [] for name in times}
    done = len(next(iter(times.values()), []))
    while times and done < most and (done < least or time.perf_counter() - start < budget):
        for name in list(times)[:: -1 if done % 2 else 1]:
            times[name].append(everyone[name]())
        done += 1
    row = {
        "seconds": {name: float(np.median(values)) for name, values in times.items()},
        "ratios": {
            f"{a} / {b}": spread(times[a], times[b]) for a in runners for b in units if a in times and b in times
        },
        "rounds": done,
    }
    return row | ({"flops": counted} if flops else {}) | ({"out_of_memory": failed} if failed else {})


def spread(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    low, median, high = np.percentile(np.divide(numerators, denominators), [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


# --- Memory ---------------------------------------------------------------------------------------------------------


class Peak:
    """How far memory rises above what is held now: PyTorch's on a GPU, else all that is resident of this process."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if LINUX:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
            self.before = psutil.Process().memory_info().rss

    def rise(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        if LINUX:  # whose ru_maxrss is at least that of the parent when it started this process
            peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(0, peak - self.before)


def in_fresh_process(function: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    """`function(*arguments)`, called in a process of its own, where no memory is used or freed yet."""
    gc.collect()  # modules and hooks refer to each other in circles
    torch.cuda.empty_cache()  # the process may need all of a GPU
    processes = ProcessPoolExecutor(1, get_context("spawn"), initializer=set_up, initargs=[torch.get_num_threads()])
    with processes:
        try:
            return processes.submit(function, *arguments).result()
        except torch.OutOfMemoryError:
            return {"out_of_memory": [function.__name__]}
