"""Work in pieces: none is done twice, and none without what it needs."""

import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.replication.work import jobs


def test_finished_jobs_are_skipped_and_needs_come_first(tmp_path):
    store, order = jobs.Store(tmp_path), []

    def job(name, *needs):
        return jobs.Job(name, lambda: order.append(name) or {"name": name}, [*needs])

    work = [job("late", "early"), job("early"), job("other/deep", "late")]
    jobs.run(work, store)
    assert order == ["early", "late", "other/deep"] and store.read("other/deep")["name"] == "other/deep"
    jobs.run(work, store)
    assert len(order) == 3
    store.path("late").unlink()
    jobs.run(work, store)
    assert order[3:] == ["late"]


def test_a_failed_job_leaves_no_result(tmp_path):
    store = jobs.Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        jobs.run([jobs.Job("bad", lambda: {"x": 1 / 0})], store)
    assert not store.has("bad")
    jobs.run([jobs.Job("bad", lambda: {"x": 1})], store)
    assert store.read("bad")["x"] == 1


@pytest.mark.slow
def test_processes_share_the_work(tmp_path, monkeypatch):
    """No piece is done twice."""
    monkeypatch.chdir(Path(benchmarks.__file__).parents[1])
    script = f"""
import time
from pathlib import Path
from benchmarks.replication.work import jobs
def work(i):
    with open({str(tmp_path / "log")!r}, "a") as file: file.write(f"{{i}}\\n")
    time.sleep(0.02)
    return {{}}
jobs.run([jobs.Job(str(i), lambda i=i: work(i)) for i in range(20)], jobs.Store(Path({str(tmp_path)!r})))
"""
    pieces, store = [jobs.Job(str(i), dict) for i in range(20)], jobs.Store(tmp_path)
    jobs.share(pieces, store, [sys.executable, "-c", script], workers=2, desc="test")
    assert not jobs.pending(pieces, store)
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(20))
    with pytest.raises(SystemExit, match="A worker failed"):
        jobs.share(pieces, store, [sys.executable, "-c", "1 / 0"], workers=1, desc="test")


def test_a_run_whose_time_is_up_begins_nothing(tmp_path):
    store, done = jobs.Store(tmp_path), []
    jobs.run([jobs.Job("one", lambda: done.append(1) or {})], store, until=0.0)
    assert not done
