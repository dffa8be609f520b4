"""What the benchmark of drafts makes of its counts and times. That it counts right: inference/test_drafts.py."""

import json
from pathlib import Path

import pytest

from benchmarks import drafts


def test_gain_of_rounds_with_two_drafts():
    """Ten tokens, ten seconds without drafts; with them, four times two forwards of the hub and a longer one."""
    row = {"tokens": 10, "forwards": {"2": 4}}
    assert drafts.gain(row, {"1": 1.0, "3": 1.2, "hub": 0.25}) == pytest.approx(10 / (4 * (2 * 0.25 + 1.2)))


def test_rounds_without_drafts_gain_nothing():
    assert drafts.gain({"tokens": 7, "forwards": {"0": 7}}, {"1": 0.3, "hub": 0.1}) == pytest.approx(1)


def test_page_is_that_of_the_results():
    results = Path(drafts.Arguments.results)
    assert results.with_suffix(".md").read_text() == drafts.report(json.loads(results.read_text()))


def test_documentation_quotes_the_results():
    results = json.loads(Path(drafts.Arguments.results).read_text())
    page = Path("docs/inference.md").read_text()
    greedy = [r for r in results["acceptance"] if (r["sample"], r["drafts"], r["threshold"]) == (False, 2, 0)]
    for kind, measured in results["cost"].items():
        gains = " | ".join(f"{drafts.gain(row, measured['seconds']):.2f}" for row in greedy)
        assert f"| {kind} experts | {gains} |" in page
