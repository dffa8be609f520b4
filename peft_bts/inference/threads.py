"""`parallel_streams`: experts on threads of their own, since between two stitches no model needs another.

On a CPU, decoding is many small steps, and a thread per model takes them faster than all threads together take one
after the other. Every layer computes just what it would compute otherwise; only who runs it, and when, is different.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ..forward.executor import Boundary, Executor, SequentialExecutor
from ..forward.hooks import ForwardSettings
from ..forward.state import ForwardState
from ..forward.stream import Checkpoint, Stream


Work = Callable[[], object]
_DEVICES = ("cpu", "cuda", "xpu", "mps")


class ThreadedExecutor(SequentialExecutor):
    """Runs streams ahead on other threads, as soon as their states are final."""

    def __init__(self, streams: Mapping[Hashable, Stream], pool: ThreadPoolExecutor) -> None:
        super().__init__(streams)
        self._pool = pool
        self._begun: list[tuple[Future[object], Work]] = []

    def look_ahead(self, boundary: Boundary) -> None:
        # Streams of one model take turns: layers that are offloaded, or repacked, change while they run.
        by_model: dict[int, list[Work]] = {}
        for stream in self.streams.values():
            by_model.setdefault(id(stream.layers), []).append(partial(stream.advance, boundary(stream)))
        for works in by_model.values():
            self._begin(partial(_in_turn, works))

    def advance(self, boundary: Boundary, checkpoint: Optional[Checkpoint] = None) -> dict[Hashable, Tensor]:
        self._finish()
        return super().advance(boundary, checkpoint)

    def close(self) -> None:
        # Nothing is left, unless there was an error; further errors are dropped, for the forward has failed already.
        for future, _ in self._begun:
            future.cancel()
        wait([future for future, _ in self._begun])
        self._begun = []

    def _begin(self, work: Work) -> None:
        try:
            self._begun.append((self._pool.submit(_as_in_this_thread(work)), work))
        except RuntimeError:  # another thread has left `parallel_streams` meanwhile
            work()

    def _finish(self) -> None:
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


@contextmanager
def parallel_streams(settings: ForwardSettings, threads: int) -> Iterator[None]:
    """Run the forwards of a model on threads for a while.

    Args:
        settings: The model's.
        threads: How many streams run at a time, the hub's among them.

    Raises:
        RuntimeError: If it is on already.
    """
    if not settings.lock.acquire(blocking=False):
        raise RuntimeError("parallel_streams() is on already.")
    with ExitStack() as entered:
        entered.callback(settings.lock.release)
        pool = entered.enter_context(_stream_threads(threads))
        before = settings.make_executor
        settings.make_executor = partial(_side_by_side, pool)
        try:
            yield
        finally:
            settings.make_executor = before


def _side_by_side(pool: ThreadPoolExecutor, state: ForwardState) -> Executor:
    streams = state.begin_streams()
    return ThreadedExecutor(streams, pool) if _may_run_otherwise() else SequentialExecutor(streams)


def _may_run_otherwise() -> bool:
    """Return whether threads compute the same: graphs, tracers and modes stay with one thread."""
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


def _in_turn(works: list[Work]) -> None:
    for work in works:
        work()


@contextmanager
def _stream_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads beside this one, `threads` with it, that share PyTorch's threads for single operations among them."""
    before = torch.get_num_threads()
    each = max(1, before // threads)
    with ThreadPoolExecutor(threads - 1, "expert", initializer=torch.set_num_threads, initargs=(each,)) as pool:
        torch.set_num_threads(each)
        try:
            yield pool
        finally:
            torch.set_num_threads(before)
