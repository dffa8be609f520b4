"""The quickstart's parts all work; that the models learn is for `make quickstart` to show."""

import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


def test_smoke(tmp_path):
    """Data, training, stitching, table, saving, and a reload in a fresh process, in a few steps each."""
    command = [sys.executable, str(SCRIPT), "--smoke", "--threads", "1", "--cache_dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for part in ("seed", "code expert", "math expert", "lang expert", "average", "stitched"):
        assert part in run.stdout
    assert "all equal to those of the trained model" in run.stdout
    written = {path.name for path in (tmp_path / "stitched-quickstart").iterdir()}
    assert written == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "seed: from the cache" in again.stdout
