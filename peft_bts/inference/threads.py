"""Experts that run ahead on threads of their own: between two stitches, no model needs another.

On a CPU, decoding is many small steps, and a thread per model takes them faster than all threads together take one
after the other. Every layer computes just what it would compute otherwise; only who runs it, and when, is different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import torch


Work = Callable[[], object]
_DEVICES = ("cpu", "cuda", "xpu", "mps")


class Ahead:
    """Work of one forward that other threads do meanwhile."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._begun: list[tuple[Future, Work]] = []

    def begin(self, work: Work) -> None:
        """Have this done."""
        try:
            self._begun.append((self._pool.submit(_as_in_this_thread(work)), work))
        except RuntimeError:  # another thread has left `parallel_streams` meanwhile
            work()

    def finish(self) -> None:
        """Return when all is done. What no thread has taken up by then, this one does."""
        begun, self._begun = self._begun, []
        try:
            for future, work in reversed(begun):
                if future.cancel():
                    work()
        finally:  # nobody writes to caches any more when an error is raised
            wait([future for future, _ in begun])
        for future, _ in begun:
            if not future.cancelled():
                future.result()

    def abandon(self) -> None:
        """Return when nobody does anything any more; errors are dropped, for the forward has failed already."""
        for future, _ in self._begun:
            future.cancel()
        wait([future for future, _ in self._begun])
        self._begun = []


def may_run_otherwise() -> bool:
    """Whether threads and stacks compute what the experts would: graphs, tracers and modes stay with one thread."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def _as_in_this_thread(work: Work) -> Work:
    """The work under this thread's autocast and inference mode."""
    inference = torch.is_inference_mode_enabled()
    casts = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}

    def run() -> object:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.no_grad())
            for device, dtype in casts.items():
                stack.enter_context(torch.autocast(device, dtype=dtype))
            return work()

    return run


class _Threads(ThreadPoolExecutor):
    """Threads of one model. Copies of the model have none."""

    def __reduce__(self):
        return type(None), ()


@contextmanager
def stream_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads beside this one, `threads` with it, that share PyTorch's threads for single operations among them."""
    before = torch.get_num_threads()
    each = max(1, before // threads)
    with _Threads(threads - 1, "expert", initializer=torch.set_num_threads, initargs=(each,)) as pool:
        torch.set_num_threads(each)
        try:
            yield pool
        finally:
            torch.set_num_threads(before)
