"""`train` in processes of its own: killed and called again, and on two processes by `accelerate launch`."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.helpers.recipes import write_recipe


PLAIN = (sys.executable, "-m", "peft_bts")
TWO = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/ddp.yaml"))
TWO += ("--main_process_port", "0", "-m", "peft_bts")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    write_recipe(root)
    return root


def start(root, program, out, *flags):
    environment = os.environ | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [*program, "train", str(root / "recipe.yaml"), "--output_dir", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, output[-2000:] + errors[-4000:]
    return output


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_killed_run_is_continued(root, tmp_path):
    """Killed by the system at any moment behind its first checkpoint: the second call ends with the same weights."""
    steps = ("--max_steps", "60", "--save_steps", "10")
    finish(start(root, PLAIN, tmp_path / "whole", *steps))
    killed = start(root, PLAIN, tmp_path / "cut", *steps)
    while not (tmp_path / "cut" / "checkpoint-10" / "trainer_state.json").exists():
        assert killed.poll() is None, killed.communicate()[1][-2000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    assert "trained for 60 steps" in finish(start(root, PLAIN, tmp_path / "cut", *steps))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    """Two processes with half of the batch each learn what one does; one of them writes, and prints."""
    # Dropout draws other numbers in each process. Plain SGD: Adam would blow up the last bits of tiny gradients.
    same = ("--gate_dropout", "0", "--optim", "sgd", "--max_grad_norm", "0", "--learning_rate", "0.1")
    same += ("--train_sampling_strategy", "sequential")  # accelerate shuffles otherwise for several processes
    finish(start(root, PLAIN, tmp_path / "one", *same))
    printed = finish(start(root, TWO, tmp_path / "two", *same, "--per_device_train_batch_size", "2"))
    assert printed.count("after training") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key  # rounding, which every step enlarges
    untrained = [key for key in one if key.endswith("gate.hub.weight") and not one[key].any()]
    assert not untrained
    card = (tmp_path / "two" / "README.md").read_text()
    assert "accelerate launch --num_processes 2 -m peft_bts train" in card
    assert "trained for 6 steps" in card and card.count("## Training\n") == 1
