"""Time as ratios: whatever is compared takes turns, and every round gives a ratio of its own.

A machine's speed drifts by more than stitches cost; between two neighbours of one round it hardly does.
"""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

Runner = Callable[[], float]  # does the work once, and returns the seconds that count


def seconds(action: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of an action, of which nothing is left in the device's queue."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, instead of giving large blocks back to the system.

    Else every large tensor is made of new pages, and what they cost depends on who ran before: on a virtual machine
    one and the same prefill took 33 seconds, and 21 when its pages were there already.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def take_turns(
    runners: dict[str, Runner],
    pairs: list[tuple[str, str]],
    *,
    budget: float,
    rounds: tuple[int, int],
    flops: bool = False,
) -> dict:
    """Run all runners round by round, in alternating order, until `budget` seconds are over.

    Args:
        runners: By name.
        pairs: Whose time is divided by whose.
        budget: Seconds, after which no new round begins.
        rounds: How many there are at least and at most. Before them comes one to warm up; where that alone takes the
            budget, it is the first of them.
        flops: Count the floating point operations of each runner while warming up, which then never counts.

    Returns:
        `seconds` (medians by runner), `ratios` (by "a / b": median and quartiles over rounds), `rounds`; and, if
        asked for, `flops`. A runner that the device has no memory for is named in `out_of_memory`, and left out.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    counted, failed = {}, []
    least, most = rounds
    start = time.perf_counter()
    for name, run in list(runners.items()):
        try:
            if flops:
                with FlopCounterMode(display=False) as counter:
                    times[name].append(run())
                counted[name] = counter.get_total_flops()
            else:
                times[name].append(run())
        except torch.OutOfMemoryError:
            failed.append(name)
            del times[name]
            torch.cuda.empty_cache()
    if flops or time.perf_counter() - start < budget:
        times = {name: [] for name in times}
    done = len(next(iter(times.values()), []))
    while times and done < most and (done < least or time.perf_counter() - start < budget):
        for name in list(times)[:: -1 if done % 2 else 1]:
            times[name].append(runners[name]())
        done += 1
    row = {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {f"{a} / {b}": spread(times[a], times[b]) for a, b in pairs if a in times and b in times},
        "rounds": done,
    }
    return row | ({"flops": counted} if flops else {}) | ({"out_of_memory": failed} if failed else {})


def spread(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators)]
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def copy_bandwidth(device: str, size: int = 2**28, times: int = 10) -> float:
    """Bytes per second that memory reads and writes while `size` bytes are copied; the fastest of some tries."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(1 + times))
