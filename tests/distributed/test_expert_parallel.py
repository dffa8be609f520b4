"""Models spread over processes (gloo, on CPU) compute what one process computes, and hold what they run."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests import ROOT
from tests.helpers import expert_parallel as script


ARCHITECTURES = ["gpt2", "gpt_neox", "bamba", "mixtral", "opt", "qwen3_next", "gemma3_text"]  # besides llama
NO_PADDING = ["gemma2", "bloom"]  # in float64, see `NO_FLOAT64_PADDING` in the zoo
SAME_BITS = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and adapters for the scenarios, and their results."""
    path = tmp_path_factory.mktemp("expert_parallel")
    script.save_models(path)
    script.save_adapter(path, "alternating")
    script.save_adapter(path, "into_hub", pattern="experts_into_hub")
    script.save_adapter(path, "lora", experts=("lora", "other"))
    script.save_adapter(path, "lora_only", experts=("lora",))
    script.save_adapter(path, "mixture", experts=("deeper", "other"), output="mixture")
    return path


class Started:
    """Processes that run scenarios."""

    def __init__(self, folder, processes, *scenarios):
        self.folder, self.scenarios = folder, scenarios
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.helpers.expert_parallel", str(folder), *scenarios]
        self.processes = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]

    def wait(self):
        """The exit code and the output of each."""
        return [
            (process.returncode, text) for process in self.processes for text in [process.communicate(timeout=600)[0]]
        ]

    def check(self):
        """Every process has got what this one gets."""
        expected = {name: script.run(self.folder, name) for name in self.scenarios}
        for code, text in self.wait():
            assert code == 0, text[-6000:]
        for name in self.scenarios:
            for rank in range(len(self.processes)):
                compare(torch.load(self.folder / "results" / f"{name}-{rank}.pt"), expected[name], f"{name}-{rank}")


def compare(found, expected, where):
    """The same tokens; numbers equal to 1e-10 of the largest, or to rounding in less than float64."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            compare(found[key], expected[key], f"{where} {key}")
    elif expected is None:
        assert found is None, where
    elif expected.is_floating_point():
        tolerance = SAME_BITS if expected.dtype == torch.float64 else 1e-5 if expected.dtype == torch.float32 else 2e-2
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        assert expected.isfinite().all() and error <= tolerance, f"{where}: off by {error:.1e}"
    else:
        assert torch.equal(found, expected), where


def results(folder, scenario, processes=2):
    return [torch.load(folder / "results" / f"{scenario}-{rank}.pt") for rank in range(processes)]


REFUSED = {
    "too many processes": "2 processes are too many for 1 models",
    "idle process": "placement leaves process 1 of 2 without a model",
    "no such process": "placement puts 'deeper' on process 2, expected a number from 0 to 1",
    "no hub": "placement says nothing of the hub",
    "no expert": r"placement says nothing of the experts \['other', 'third'\]",
    "loaded before": "The hub was loaded before `with expert_parallel",
    "modules": r"modules_to_save=\['lm_head'\] is not supported",
    "dropout": "gate_dropout=0.1 is not supported",
    "inputs": "called with different input_ids: process 1 has other ones than process 0",
    "lengths": r"called with different input_ids.*\(2, 12\), \(2, 11\)",
    "hidden states": "output_hidden_states is not supported",
    "seconds": "max_time is not supported",
    "export": r"export\(\) needs all models in one process",
    "threads": r"parallel_streams\(\) needs all models in one process",
    "sharding": "FSDP2.* needs all models in one process",
    "quantised": "Expert 'q' has quantization_config",
    "missing": "Expert 'q' could not be loaded",
}


def test_two_processes(folder):
    """All of it with two processes that are started once."""
    compared = ["alternating", "into_hub", "lora", "modes", "life", "checkpointing"]
    started = Started(folder, 2, *compared, "memory", "refusals")
    started.scenarios = compared
    started.check()

    for rank, found in enumerate(results(folder, "memory")):
        assert found["auto"] == ([["deeper", "hub"], ["other", "third"]][rank], 0)
        assert found["given"] == ([["deeper"], ["hub", "other", "third"]][rank], 0)

    for found in results(folder, "refusals"):
        assert found["messages"].keys() == REFUSED.keys()
        for name, pattern in REFUSED.items():
            assert re.search(pattern, found["messages"][name]), found["messages"][name]
        compare(found["logits"], script.decode(script.load(folder, "alternating")), "after what was refused")


@pytest.mark.slow
def test_mixture(folder):
    """The output mixture, with stitches and without."""
    script.save_adapter(folder, "gates_alone", experts=("deeper", "other"), output="mixture", num_stitches=0)
    Started(folder, 2, "mixture", "gates_alone").check()


@pytest.mark.slow
def test_low_precision(folder):
    Started(folder, 2, "low_precision").check()


@pytest.mark.slow
def test_architectures(folder):
    """Hubs of other architectures, alternating and with all stitches into the hub; four processes."""
    script.save_models(folder, [*ARCHITECTURES, *NO_PADDING])
    names = []
    for arch in [*ARCHITECTURES, *NO_PADDING]:
        for pattern in ("alternating", "experts_into_hub"):
            script.save_adapter(folder, f"{arch}-{pattern}", hub=arch, experts=("deeper", arch), pattern=pattern)
            names.append(f"{arch}-{pattern}" + "_unpadded" * (arch in NO_PADDING))
    Started(folder, 2, *names).check()


@pytest.mark.slow
def test_four_processes(folder):
    """A model per process, with depth and width of its own."""
    Started(folder, 4, "alternating", "modes").check()


@pytest.mark.slow
@pytest.mark.parametrize("processes, scenario", [(2, "trainer"), (4, "trainer_and_data")])
def test_trainer(folder, processes, scenario):
    """Trainer over an expert axis, and over data x expert: the losses and weights of one process, also resumed."""
    started = Started(folder, processes, scenario)
    expected = script.run(folder, scenario)
    for code, text in started.wait():
        assert code == 0, text[-6000:]
    assert expected["losses"][0, 0] != pytest.approx(expected["losses"][0, -1], abs=0.01)
    for found in results(folder, scenario, processes):
        assert torch.allclose(found["losses"], expected["losses"], atol=2e-4, rtol=0)
        assert torch.equal(found["losses"][0], found["losses"][1])
        for name, weight in expected["weights"].items():
            assert torch.allclose(found["weights"][name], weight, atol=1e-4), name


@pytest.mark.slow
def test_a_process_that_dies(folder):
    """The others end with an error that says which it was."""
    started = Started(folder, 2, "dying")
    begun = time.monotonic()
    (survivor, text), (dead, _) = started.wait()
    assert dead == 7 and survivor == 1
    assert "cannot go on together: process 1 does not answer any more" in text
    assert time.monotonic() - begun < 300
