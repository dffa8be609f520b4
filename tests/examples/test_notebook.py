"""`examples/quickstart.ipynb`: its outputs are complete, and its code still runs."""

import json
import os
import subprocess
import sys
from itertools import groupby

import pytest

from tests import ROOT


NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def kinds(cells):
    """What each cell shows, but for progress bars (stderr): streams by name, everything else by its MIME types."""
    shown = [[out.get("name") or sorted(out["data"]) for out in cell["outputs"]] for cell in cells]
    return [[kind for kind, _ in groupby(kind for kind in outputs if kind != "stderr")] for outputs in shown]


def test_outputs_are_those_of_one_run():
    """All cells have been run once, in order and without errors; tables and figures are there."""
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    text = "".join("".join(output.get("text") or output["data"]["text/plain"]) for output in outputs)
    assert "Before stitching" in text and "After stitching" in text and "are equal" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.slow
def test_code_runs(tmp_path):
    """The code runs as a script, with only a few steps of training."""
    code = "\n".join("".join(cell["source"]) for cell in CELLS)
    lines = [line for line in code.splitlines() if not line.startswith("%")]
    script = "\n".join(lines).replace("stages=stages", "stages=stages, smoke=True")
    assert script.count("smoke=True") == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "After stitching" in run.stdout and "are equal" in run.stdout


@pytest.mark.slow
def test_run_as_a_notebook(tmp_path):
    """Run anew, every cell shows what it shows in the repository: the same kinds of outputs, and no errors."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": tmp_path}}).execute()
    assert kinds(cell for cell in notebook.cells if cell.cell_type == "code") == kinds(CELLS)
