"""`recipes/toy.yaml` from end to end, as its first lines say, each command in a process of its own; few steps."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests import ROOT


def command(folder, *arguments):
    """A command in a fresh process, without network; return what it printed."""
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


LOGITS = """
import sys, torch, peft_bts
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
kind = AutoPeftModelForCausalLM if sys.argv[2] == "adapter" else AutoModelForCausalLM
with torch.no_grad():
    torch.save(kind.from_pretrained(sys.argv[1]).eval()(input_ids=torch.arange(40)[None]).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_toy(tmp_path):
    """Train, evaluate, look, export; adapter and export give the same logits, in processes that know nothing else."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    command(tmp_path, "-m", "peft_bts.toy", ".cache/toy", "--smoke")

    def ours(name, *arguments):
        return json.loads(command(tmp_path, "-m", "peft_bts", name, "recipes/toy.yaml", *arguments, "--json"))

    assert ours("check")["ok"]
    trained = ours("train", "--max_steps", "3", "--block_size", "32", "--logging_steps", "1")
    assert trained["steps"] == 3
    evaluated = ours("eval", "--device", "cpu")
    assert list(evaluated["stitched"]) == ["text", "code", "math", "lang"]
    assert sorted(ours("gates", "--device", "cpu", "--max-tokens", "64")["rows"][0]["gates"]) == [
        "code",
        "hub",
        "lang",
        "math",
    ]
    ours("export", ".cache/toy/whole")
    for folder, kind in (("stitch", "adapter"), ("stitch", "adapter"), ("whole", "export")):
        name = f"{kind}-{len(list(tmp_path.glob('*.pt')))}.pt"
        command(tmp_path, "-c", LOGITS, f".cache/toy/{folder}", kind, name)
    first, again, exported = (torch.load(tmp_path / name) for name in ("adapter-0.pt", "adapter-1.pt", "export-2.pt"))
    assert torch.equal(first, again) and torch.allclose(first, exported, atol=1e-5)
