"""`benchmarks/mixture.py`: its figures against arithmetic, and all of it once at its smallest."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from benchmarks import mixture
from benchmarks.replication.data import Rows
from peft_bts import toy
from tests.helpers.zoo import tiny_model


def test_sums_of_rows():
    """Losses and hits of scored tokens alone, row by row; the first token is predicted by nobody."""
    tokens, labels = torch.tensor([[1, 2, 3], [1, 0, 2]]), torch.tensor([[1, 2, 3], [-100, -100, 2]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = logits[1, 1, 1] = math.log(2)
    rows = Rows(tokens, labels, torch.zeros(2, dtype=torch.long))
    nats, counts, right, _ = mixture.per_row(lambda tokens, prompt: logits, rows)
    assert counts.tolist() == [2, 1] and right.tolist() == [1, 0]
    assert nats == pytest.approx([math.log(5 / 2) + math.log(4), math.log(5)])


def test_figures_are_averages_over_domains_and_paired():
    def measured(shift):
        names = [*toy.DOMAINS, mixture.SWITCHES]
        nats = {name: np.array([1.0, 3.0]) * (i + 1) + shift for i, name in enumerate(names)}
        return mixture.Measured(nats, *({name: np.full(2, 2.0) for name in names} for _ in range(3)))

    ours, theirs = measured(0.0), measured(0.5)
    found = mixture.figures(ours, theirs)
    assert found["loss"]["value"] == pytest.approx(ours.loss()) == pytest.approx(2.5)  # mean of 1, 2, 3, 4
    assert found["switches"]["value"] == pytest.approx(5 / math.log(2))
    difference = found["loss"]["difference"]
    assert difference["value"] == pytest.approx(-0.25) and difference["low"] == pytest.approx(difference["high"])
    assert "difference" not in mixture.figures(ours)["loss"]


def test_gates_on_logits_start_as_their_mean():
    models = [tiny_model("llama", seed=seed) for seed in range(3)]
    ids = torch.randint(3, 64, (2, 7))
    gates = mixture.LogitGates(models)
    expected = sum(model(input_ids=ids).logits for model in models) / 3
    torch.testing.assert_close(gates(input_ids=ids).logits, expected)
    gates(input_ids=ids, labels=ids).loss.backward()
    assert gates.gate.weight.grad.any() and all(p.grad is None for model in models for p in model.parameters())


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    """Two runs: the second one takes everything from the cache, and finds the same."""
    found = []
    for _ in range(2):
        path = tmp_path / "mixture.json"
        options = ["--smoke", "--threads=1", "--steps", "2", "--rates", "1e-3", "--cache_dir", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["mixture.py", *options, "--results", str(path)])
        mixture.main()
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1] and found[0]["forms"].keys() == mixture.FORMS.keys()
    page = path.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in [*mixture.FORMS, "BTM"])
