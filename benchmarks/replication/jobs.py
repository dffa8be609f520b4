"""Work in pieces. A piece writes one result file, and is skipped where that file exists; a kill loses one piece.

Several processes, started side by side on the same folder, share the work: a piece is locked while it is worked on,
and a lock dies with its process.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm


@dataclass
class Job:
    """A piece of work: `work()` returns what goes into its result file. `needs`: pieces that come first."""

    name: str
    work: Callable[[], dict[str, Any]]
    needs: list[str] = field(default_factory=list)


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


def run(jobs: list[Job], store: Store, desc: Optional[str] = None) -> None:
    """Do what is not done yet, in order as far as needs and other processes allow."""
    with tqdm(total=len(jobs), desc=desc, unit="piece") as bar:
        while missing := [job for job in jobs if not store.has(job.name)]:
            bar.n = len(jobs) - len(missing)
            bar.refresh()
            for job in missing:
                if all(store.has(need) for need in job.needs):
                    with store.lock(job.name) as mine:
                        if mine and not store.has(job.name):
                            bar.set_description(job.name)
                            start, cpu_start = time.perf_counter(), time.process_time()
                            result = job.work()
                            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                            store.write(job.name, {**result, "seconds": seconds, "cpu_seconds": cpu_seconds})
                            break  # look again from the start: others may have come free
            else:
                time.sleep(1)  # what is left waits for other processes
        bar.n = len(jobs)
        bar.set_description(desc)
