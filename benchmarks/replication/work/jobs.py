"""Work in pieces. A piece writes one result file, and is skipped where that file exists; a kill loses one piece.

Several processes, started side by side on the same folder, share the work: a piece is locked while it is worked on,
and a lock dies with its process.
"""

import fcntl
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from ...reporting import commit


@dataclass
class Job:
    """A piece of work: `work()` returns what goes into its result file.

    `needs`: pieces that come first, whose files it takes. `reads`: pieces that come first, of which it takes results
    only. `keeps`: files that it makes for others; where one of them is gone, and a piece that needs it is not done,
    this one is done again.
    """

    name: str
    work: Callable[[], dict[str, Any]]
    needs: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    keeps: list[Path] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return all(path.exists() for path in self.keeps)


class Store:
    """Result files, `<folder>/<name>.json`, and a folder `<folder>/<name>` for what else a piece wants to keep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name).read_text())

    def write(self, name: str, result: dict[str, Any]) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(result) + "\n")
        unfinished.replace(path)

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Whether nobody else works on this piece; nobody else will, inside."""
        path = self.folder / "locks" / name.replace("/", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def pending(jobs: list[Job], store: Store) -> list[Job]:
    """What is still to be done: pieces without a result, and those whose files they need and which are gone."""
    by_name = {job.name: job for job in jobs}
    wanted = {job.name for job in jobs if not store.has(job.name)}
    look_at = list(wanted)
    while look_at:
        for need in by_name[look_at.pop()].needs:
            if need not in wanted and not by_name[need].kept:
                wanted.add(need)
                look_at.append(need)
    return [job for job in jobs if job.name in wanted]


def run(jobs: list[Job], store: Store, desc: Optional[str] = None, until: float = math.inf) -> None:
    """Do what is not done yet, in order as far as needs and other processes allow; begin nothing after `until`.

    `until` is in seconds since the epoch, as `time.time()` gives them. Every result is given the commit that made it.
    """
    of_all = {"commit": commit()}
    with tqdm(total=len(jobs), desc=desc, unit="piece") as bar:
        while missing := pending(jobs, store):
            bar.n = len(jobs) - len(missing)
            bar.refresh()
            waiting = {job.name for job in missing}
            if time.time() > until:
                break
            for job in missing:
                if waiting.isdisjoint(job.needs) and all(map(store.has, job.reads)):
                    with store.lock(job.name) as mine:
                        if mine and not (store.has(job.name) and job.kept):
                            bar.set_description(job.name)
                            start, cpu_start = time.perf_counter(), time.process_time()
                            result = job.work()
                            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                            store.write(job.name, {**result, **of_all, "seconds": seconds, "cpu_seconds": cpu_seconds})
                            break  # look again from the start: others may have come free
            else:
                time.sleep(1)  # what is left waits for other processes
        else:
            bar.n = len(jobs)
        bar.set_description(desc)


def share(jobs: list[Job], store: Store, command: list[str], workers: int, desc: str) -> None:
    """Start `command` so many times, each with one thread, and wait until all of them have ended.

    Each is to `run` the same jobs on the same store.

    Raises:
        SystemExit: If one of them fails, with the end of its log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [store.place("logs") / f"worker{number}.log" for number in range(workers)]
    started = []
    try:
        for log in logs:
            with open(log, "w") as file:
                started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        with tqdm(total=len(jobs), desc=f"{desc}, {workers} workers", unit="piece") as bar:
            while any(worker.poll() is None for worker in started):
                bar.n = sum(store.has(job.name) for job in jobs)
                bar.refresh()
                time.sleep(1)
                failed = [log for worker, log in zip(started, logs) if worker.poll()]
                if failed:
                    raise SystemExit(f"A worker failed; the end of {failed[0]}:\n{failed[0].read_text()[-3000:]}")
            bar.n = sum(store.has(job.name) for job in jobs)
    finally:
        for worker in started:
            worker.terminate()
