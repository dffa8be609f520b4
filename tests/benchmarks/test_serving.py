"""The serving benchmark where there is no vLLM: its models, transformers' batches, and the report."""

from dataclasses import asdict

import pytest
from transformers import AutoTokenizer

from benchmarks.serving import PRESETS, measure_transformers, report, write_models


PRESET = PRESETS["smoke"]


@pytest.mark.filterwarnings("ignore:Expert .* came from no id")
def test_models_and_batches(tmp_path):
    folders = write_models(PRESET.case, tmp_path)
    for folder in folders.values():
        assert AutoTokenizer.from_pretrained(folder)("w7 w511")["input_ids"] == [7, 511]
    row = measure_transformers(folders["stitched"], PRESET, 2)
    assert row["concurrent"] == 2
    assert row["tokens_per_second"] * row["per_token_ms"] / 1000 == pytest.approx(2)  # of one step


def test_report(tmp_path):
    row = {"tokens_per_second": 123.456, "tokens_per_cpu_second": 61.7, "per_token_ms": 8.1}
    rows = [
        {"model": "transformers", "concurrent": 2, **row},
        {"model": "hub", "concurrent": 2, **row, "first_token_ms": 40.4},
        {"model": "stitched", "concurrent": 1, **row, "first_token_ms": 50.5},
    ]
    results = {"machine": "a CPU", "threads": 1, "settings": asdict(PRESET), "rows": rows}
    page = report(results, tmp_path / "serving.json")
    lines = [line for line in page.splitlines() if " | 123.5 | " in line]
    assert [line.split(" | ")[0] for line in lines] == [
        "| stitched, vLLM",
        "| hub alone, vLLM",
        "| stitched, transformers' batch",
    ]
    assert lines[1] == "| hub alone, vLLM | 2 | 123.5 | 61.7 | 40.4 | 8.1 |"
    assert (tmp_path / "serving" / "throughput.png").exists() and "(serving/throughput.png)" in page
