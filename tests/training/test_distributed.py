"""Training through accelerate with two processes: every step's loss is that of one process on the same batches.

The processes run distributed_training.py, on CPU (gloo), launched with the config files of examples/accelerate.
"""

import importlib.util
import os
import subprocess
import sys

import accelerate
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.dataclasses import get_module_class_from_name
from packaging import version
from peft import AutoPeftModelForCausalLM

from tests import ROOT
from tests.helpers import distributed_training as script
from tests.helpers.models import adapter_file, assert_near, fresh, logits, stitch


pytestmark = pytest.mark.skipif(
    version.parse(accelerate.__version__) < version.parse("1.15"),
    reason="accelerate 1.13 loses keys where Trainer resumes under FSDP2; 1.14 was not tried",
)

ONES = torch.ones_like(script.DATA[: script.BATCH])
STITCHES = ("stitch_layer", "stitch_output", "modules_to_save")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models for the scenarios, and their results."""
    path = tmp_path_factory.mktemp("distributed")
    script.save_models(path)
    return path


def launch(config, folder, *scenarios, check=True):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{config}.yaml"), "--main_process_port", "0"]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, script.__file__, str(folder), *scenarios],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def check(folder, scenario, kind):
    """A scenario that two processes have run against the same in this process."""
    result = torch.load(folder / scenario / "result.pt")
    assert result["kind"] == kind

    # What was saved is the whole adapter; loaded in another process, it gives the distributed model's very logits.
    model = AutoPeftModelForCausalLM.from_pretrained(folder / scenario)
    reloaded = logits(model, script.DATA[: script.BATCH], attention_mask=ONES)
    assert scenario == "bf16" or torch.equal(reloaded, result["logits"])
    tensors, _ = adapter_file(model)
    assert all(any(part in key for part in (*STITCHES, "lm_head")) for key in tensors)

    script.train(folder / "one_process", scenario, **script.SCENARIOS[scenario], models=folder)
    expected = torch.load(folder / "one_process" / scenario / "result.pt")
    assert expected["kind"] == "DistributedType.NO"
    assert expected["losses"][0] != pytest.approx(expected["losses"][-1], abs=0.01)  # the weights move
    if scenario == "bf16":  # compared with float32: after the first step rounding has changed the weights
        assert result["losses"] == pytest.approx(expected["losses"], rel=0.03)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    else:
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert_near(result["logits"], expected["logits"], 1e-3)
    return result


def check_sharding(result):
    """Between steps every weight is spread over the processes, those of the experts included."""
    assert all(result["sharded"].values()) and any(".experts." in name for name in result["sharded"])


def test_two_processes(folder):
    """DDP by a plain loop, FSDP2 by a plain loop, and FSDP2 by Trainer with gradient checkpointing."""
    launch("fsdp2", folder, "ddp", "alternating", "trainer_checkpointing")
    check(folder, "ddp", "DistributedType.MULTI_CPU")
    check_sharding(check(folder, "alternating", "DistributedType.FSDP"))
    check_sharding(check(folder, "trainer_checkpointing", "DistributedType.FSDP"))


@pytest.mark.slow
def test_ddp(folder):
    """DDP, and FSDP2 asked for by TrainingArguments."""
    scenarios = ["alternating", "experts_into_hub", "checkpointing", "reentrant", "trainer", "lora", "bf16"]
    scenarios += ["mixture", "output_gates", "mixture_checkpointing"]
    launch("ddp", folder, *scenarios, "fsdp_arguments")
    for scenario in scenarios:
        check(folder, scenario, "DistributedType.MULTI_CPU")
    check_sharding(check(folder, "fsdp_arguments", "DistributedType.FSDP"))


FSDP2 = [
    "experts_into_hub",
    "checkpointing",
    "reentrant",
    "token_gates",
    "mixture",
    "output_gates",
    "mixture_checkpointing",
    "tied",
    "bloom",
    "modules_to_save",
    "trainer",
]
FSDP2 += ["sharded_checkpoint", "rank_0_loads", "fsdp_checkpointing", "bf16"]


@pytest.mark.slow
def test_fsdp2(folder):
    """Both patterns, other architectures, tied heads, all ways of checkpointing, other ways of saving and loading."""
    launch("fsdp2", folder, *FSDP2)
    for scenario in FSDP2:
        check_sharding(check(folder, scenario, "DistributedType.FSDP"))


@pytest.mark.slow
def test_fsdp2_refuses_shared_weights(folder):
    """A LoRA expert's weights are the hub's, which FSDP2 cannot shard twice: torch says so, and names the expert."""
    done = launch("fsdp2", folder, "lora", check=False)
    assert done.returncode != 0 and "experts.default.lora" in done.stderr and "is shared with" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_zero3(folder):
    scenarios = ["alternating", "experts_into_hub", "mixture", "output_gates"]
    launch("deepspeed_zero3", folder, *scenarios)
    for scenario in scenarios:
        check(folder, scenario, "DistributedType.DEEPSPEED")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3", "expert_parallel"])
def test_config_files(name):
    """accelerate knows every key of the config files."""
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 2


@pytest.mark.parametrize("pattern", ["alternating", "experts_into_hub"])
def test_units(pattern):
    """The units that FSDP2 shards by default cover every layer and stitch, and no unit calls into another."""
    model = stitch(fresh("llama"), {"a": fresh("gpt2", seed=1), "b": fresh("llama", seed=2)}, pattern=pattern)
    names = ["Expert", "ExpertsIntoHub", "GPT2Block", "LlamaDecoderLayer"]
    assert list(model._no_split_modules) == sorted([*names, "HubIntoExperts"] if pattern == "alternating" else names)
    classes = tuple(get_module_class_from_name(model, name) for name in model._no_split_modules)
    units = [name for name, module in model.named_modules() if isinstance(module, classes)]
    assert len(units) == 4 + 4 + 2 + 4 + 4  # hub's layers, stitches, experts, and their layers


def test_layers_keep_private_attributes_to_themselves():
    """accelerate marks a wrapped layer by one, and would take the `StitchLayer` around it for wrapped."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)})
    layer = model.get_base_model().model.layers[0]
    layer.base_layer._treated = layer.base_layer.treated = True
    assert layer.treated and not hasattr(layer, "_treated")
