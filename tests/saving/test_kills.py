"""A process that is killed while it saves, or loads: what lies there is whole, or refused, and never mixed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from peft import AutoPeftModelForCausalLM

from tests import ROOT
from tests.helpers.checkpoints import make, read, stitches


SAVES = """
import sys, torch
from peft import AutoPeftModelForCausalLM
import peft_bts
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
weights = [p for name, p in model.named_parameters() if ".stitch_layer." in name]
for value in range(1, 10**6):
    with torch.no_grad():
        for weight in weights:
            weight.fill_(value)
    model.save_pretrained(sys.argv[2])
    print(value, flush=True)
"""
LOADS = """
import sys
from peft import AutoPeftModelForCausalLM
import peft_bts
while True:
    AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded", flush=True)
"""


def kill(program, *arguments, rounds, after):
    """Run a program until it has printed so many lines, and kill it some seconds later."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        for _ in range(rounds):
            assert child.stdout.readline(), child.stderr.read()
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of Unix")
@pytest.mark.parametrize("number", range(6))
def test_killed_while_saving(root, tmp_path, number):
    rng = random.Random(number)
    make(root).save_pretrained(root / "whole")
    adapter = root / f"killed-{number}"
    kill(SAVES, root / "whole", adapter, rounds=rng.randint(1, 4), after=rng.uniform(0, 0.15))
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    except ValueError:
        return  # said so; test_damaged_files.py reads the messages
    values = {value for weight in stitches(model) for value in weight.unique().tolist()}
    assert len(values) == 1, f"weights of {len(values)} moments"
    assert {value for tensor in read(adapter)[0].values() for value in tensor.unique().tolist()} == values


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of Unix")
def test_killed_while_loading(root):
    """Reading changes nothing on the disk."""
    make(root).save_pretrained(root / "read")
    before = {path.name: path.read_bytes() for path in (root / "read").iterdir()}
    for after in (0.0, 0.02, 0.1):
        kill(LOADS, root / "read", rounds=1, after=after)
        assert {path.name: path.read_bytes() for path in (root / "read").iterdir()} == before
    AutoPeftModelForCausalLM.from_pretrained(root / "read")
