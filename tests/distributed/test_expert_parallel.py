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
from tests.helpers.harness import write_tasks


ARCHITECTURES = ["gpt2", "gpt_neox", "bamba", "opt", "gemma3_text"]  # besides llama
NO_PADDING = ["gemma2", "bloom"]  # in float64, see `NO_FLOAT64_PADDING` in the zoo
NO_FLOAT64 = ["mixtral", "qwen3_next"]  # mixtures of experts, whose kernel is chosen when they are loaded
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

    def __init__(self, folder, processes, *scenarios, launched=False):
        self.folder, self.scenarios = folder, scenarios
        if launched:
            self._launch(processes)
        else:
            self._start(processes)

    def _launch(self, processes):
        """By accelerate, which starts them itself."""
        config = ROOT / "examples" / "accelerate" / "expert_parallel.yaml"
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
        self.ranks, self.processes = range(processes), [self._open([*command, script.__file__], {})]

    def _start(self, processes):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.helpers.expert_parallel"]
        self.ranks = range(processes)
        self.processes = [
            self._open(command, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in self.ranks
        ]

    def _open(self, command, environment):
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*command, str(self.folder), *self.scenarios],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self):
        """The exit code and the output of each."""
        return [
            (process.returncode, text) for process in self.processes for text in [process.communicate(timeout=600)[0]]
        ]

    def succeed(self):
        """None has failed."""
        ended = self.wait()
        assert not any(code for code, _ in ended), "\n".join(text[-3000:] for code, text in ended if code)

    def check(self):
        """Every process has got what this one gets."""
        expected = {name: script.run(self.folder, name) for name in self.scenarios}
        self.succeed()
        for name in self.scenarios:
            for rank in self.ranks:
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
        tolerance = {torch.float64: SAME_BITS, torch.float32: 1e-5}.get(expected.dtype, 2e-2)
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
    "traced": "called in different ways: trace_gates is on in process 1 only",
    "experts": r"not all have the same active experts: process 0 has \['deeper', 'other', 'third'\]; .* \['other'\]",
    "limits": "not all have the same limits for leaving out experts: .*max_active_experts=1, .*max_active_experts=2",
    "labels": "called with different labels: process 1 has other ones than process 0",
    "items": r"called with different num_items_in_batch: .*\[7, 8\]",
    "active": "called in different ways: process 1 is elsewhere in its forward than process 0",
    "draft": "draft='hub' is not supported",
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
        for logits in ("logits", "unchecked"):
            compare(found[logits], script.decode(script.load(folder, "alternating")), "after what was refused")


@pytest.mark.slow
def test_mixture(folder):
    """The output mixture, with stitches, without, and with gates that go by evidence."""
    gates = {"experts": ("deeper", "other"), "output": "mixture", "num_stitches": 0}
    script.save_adapter(folder, "gates_alone", **gates)
    script.save_adapter(folder, "evidence", **gates, evidence=0.8)
    Started(folder, 2, "mixture", "gates_alone", "evidence").check()


@pytest.mark.slow
def test_low_precision(folder):
    Started(folder, 2, "low_precision").check()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_architectures(folder, processes):
    """Hubs and experts of other architectures, alternating and with all stitches into the hub."""
    script.save_models(folder, [*ARCHITECTURES, *NO_PADDING, *NO_FLOAT64])
    names = []
    for arch in [*ARCHITECTURES, *NO_PADDING, *NO_FLOAT64]:
        experts = "deeper", arch, "third"
        how = "-in-full" * (arch in NO_PADDING) + "-in-float32" * (arch in NO_FLOAT64)
        for pattern in ("alternating", "experts_into_hub"):
            dtype = torch.float32 if arch in NO_FLOAT64 else torch.float64
            script.save_adapter(folder, f"{arch}_{pattern}", arch, experts, dtype, pattern=pattern)
            names.append(f"{arch}_{pattern}{how}")
    Started(folder, processes, *names).check()


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
    started.succeed()
    assert (expected["losses"][0, 0] - expected["losses"][0, -1]).abs() > 0.01  # the weights move
    for found in results(folder, scenario, processes):
        assert torch.allclose(found["losses"], expected["losses"], atol=2e-4, rtol=0)
        assert torch.equal(found["losses"][0], found["losses"][1])
        for name, weight in expected["weights"].items():
            assert torch.allclose(found["weights"][name], weight, atol=1e-4), name


@pytest.mark.slow
def test_trl(folder):
    """SFTTrainer, in processes that `accelerate launch` starts with the config file of the examples."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    Started(folder, 2, "trl", launched=True).check()


@pytest.mark.slow
def test_lm_eval(folder):
    pytest.importorskip("lm_eval")
    write_tasks(folder)
    Started(folder, 2, "harness").succeed()
    compare(results(folder, "harness")[0], script.run(folder, "harness"), "harness")


@pytest.mark.slow
def test_a_process_that_dies(folder):
    """The others end with an error that says which it was."""
    started = Started(folder, 2, "dying")
    begun = time.monotonic()
    (survivor, text), (dead, _) = started.wait()
    assert dead == 7 and survivor == 1
    assert "cannot go on together: process 1 does not answer any more" in text
    assert time.monotonic() - begun < 300
