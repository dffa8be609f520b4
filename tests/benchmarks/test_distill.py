"""`benchmarks/distill.py`: its report against arithmetic, and all of it once at its smallest."""

import json
import subprocess
import sys

import pytest

from benchmarks import distill
from peft_bts import toy
from tests import ROOT


def measured(average, **about):
    return {**about, "average": average, "domains": {name: {"loss": 1.0, "accuracy": average} for name in toy.DOMAINS}}


def test_report():
    """Students of a kind together: mean, spread, and the part of the gain that survives."""
    models = {"seed": measured(20.0), "stitched": measured(60.0)}
    for seed, average in enumerate((35.0, 40.0, 45.0)):
        models[f"d{seed}"] = measured(average, method="distilled", steps=400, seed=seed)
    models["t"] = measured(24.0, method="trained", steps=400, seed=0)
    rows = [line.split(" | ") for line in distill.report(models).splitlines() if line.startswith("| ")][2:]
    assert [row[:4] for row in rows] == [
        ["| seed", "", "20.0", "0%"],
        ["| stitched", "", "60.0", "100%"],
        ["| distilled, 400 steps", "3", "40.0 (35.0 to 45.0)", "50%"],
        ["| trained, 400 steps", "1", "24.0", "10%"],
    ]
    assert all(len(row) == 4 + len(toy.DOMAINS) for row in rows) and rows[2][4] == "1.00, 40.0"


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    """After a smoke run of the quickstart; a second run finds everything done."""
    cache = tmp_path / "cache"
    quickstart = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--smoke", "--cache_dir", str(cache)]
    subprocess.run([*quickstart, "--threads", "1"], check=True, capture_output=True)
    path = tmp_path / "distill.json"
    options = ["--smoke", "--threads=1", "--runs", "2:0", "--cache_dir", str(cache), "--results", str(path)]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["distill.py", *options])
    distill.main()
    found = json.loads(path.read_text())
    assert list(found["models"]) == ["seed", "stitched", "distilled, 2 steps, seed 0", "trained, 2 steps, seed 0"]
    page = path.with_suffix(".md").read_text()
    monkeypatch.setattr(distill, "train", lambda *_: pytest.fail("trained again"))
    distill.main()
    assert json.loads(path.read_text())["models"] == found["models"] and path.with_suffix(".md").read_text() == page
