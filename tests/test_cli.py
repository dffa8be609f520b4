"""The command line: what it prints, for people and programs, and its exit codes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import IDS, fresh, logits, randomize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from zoo import tiny_config

from peft_bts import StitchConfig, check_compatibility, plan
from peft_bts.cli import app


@pytest.fixture
def folders(tmp_path):
    """Configs of a hub and of experts that fit (`code`) or do not (`short`); no weights."""
    for name, sizes in {"hub": {}, "code": {"layers": 6, "width": 48}, "short": {"vocab": 48}}.items():
        tiny_config("llama", **sizes).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter on saved models, and the model as it was saved."""
    fresh("llama").save_pretrained(tmp_path / "hub")
    fresh("gpt2", seed=1, width=48).save_pretrained(tmp_path / "gpt")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(fresh("llama"), lora).save_pretrained(tmp_path / "lora")
    experts = {"code": str(tmp_path / "gpt"), "tax": str(tmp_path / "lora")}

    def make(**options):
        hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
        model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", experts=experts, num_stitches=2, **options))
        randomize(model).eval().save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter"), model

    return make


def call(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output

    return result


def test_check(folders):
    """Exit code 0 if all experts fit, else 1, with the reports on stdout either way."""
    hub = ("check", "--hub", folders / "hub", "--expert", f"code={folders / 'code'}")
    assert "Expert 'code' fits the hub." in call(*hub).stdout
    data = json.loads(call(*hub, "--json").stdout)
    report = check_compatibility(str(folders / "hub"), str(folders / "code"), name="code")
    assert data == {"ok": True, "experts": {"code": report.to_dict()}}
    both = (*hub, "--expert", f"s={folders / 'short'}")
    result = call(*both, code=1)
    assert "Expert 'code' fits" in result.stdout and "Expert 's' does not fit" in result.stdout
    data = json.loads(call(*both, "--json", code=1).stdout)
    assert not data["ok"] and data["experts"]["code"]["ok"] and not data["experts"]["s"]["ok"]


def test_plan(folders):
    """The options reach the config; the figures are those of `plan`."""
    options = ["--num-stitches", 2, "--gate", "token", "--no-gate-bias", "--r", 4, "--pattern", "experts_into_hub"]
    command = ("plan", "--hub", folders / "hub", "--expert", f"code={folders / 'code'}", "--sequence-length", 8)
    data = json.loads(call(*command, *options, "--json").stdout)
    config = StitchConfig(
        task_type="CAUSAL_LM", num_stitches=2, gate="token", gate_bias=False, r=4, pattern="experts_into_hub"
    )
    estimate = plan(str(folders / "hub"), {"code": str(folders / "code")}, config, sequence_length=8)
    assert data == estimate.to_dict()
    text = call(*command).stdout
    assert "stitches" in text and "models in bfloat16" in text
    layers = json.loads(call(*command, "--layers-to-stitch", 1, "--layers-to-stitch", 3, "--json").stdout)
    assert layers["stitches"] == json.loads(call(*command, "--num-stitches", 2, "--json").stdout)["stitches"]


def test_inspect(adapter):
    """Everything an adapter's files tell; norms against the loaded model's own weights."""
    folder, model = adapter()
    data = json.loads(call("inspect", folder, "--json").stdout)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    assert data["weights"] == sum(t.numel() for t in tensors.values()) and data["weights_outside_of_stitches"] == 0
    assert data["experts"]["code"]["model"].endswith("gpt") and data["experts"]["tax"]["adapter"].endswith("lora")
    assert {layer: stitch["kind"] for layer, stitch in data["stitches"].items()} == {
        "1": "hub_into_experts",
        "3": "experts_into_hub",
    }
    layers = model.base_model.model.model.layers
    for layer, stitch in data["stitches"].items():
        real = layers[int(layer)].stitch_layer["default"]
        assert list(stitch["models"]) == sorted(real.gate.names())
        for name, found in stitch["models"].items():
            gate = real.gate.of(name)
            assert found["gate_weight_rms"] == pytest.approx(gate.weight.pow(2).mean().sqrt().item(), rel=1e-5)
            assert found["gate_bias_rms"] == pytest.approx(gate.bias.pow(2).mean().sqrt().item(), rel=1e-5)
            if name == "hub":
                assert found["proj_distance"] is None
                continue
            weight = real.proj.of(name).weight
            identity = torch.eye(*weight.shape)
            assert found["proj_shape"] == list(weight.shape)
            assert found["proj_distance"] == pytest.approx(
                ((weight - identity).norm() / identity.norm()).item(), rel=1e-4
            )
    text = call("inspect", folder).stdout
    for word in ("code", "tax", "LoRA on the hub", "experts-into-hub", f"{data['weights']:,} weights in 2 stitches"):
        assert word in text


def test_inspect_low_rank(adapter):
    """The distance of a low-rank projection is that of the matrix it stands for; models need not be there."""
    folder, model = adapter(r=3, gate_bias=False)
    found = json.loads(call("inspect", folder, "--json").stdout)["stitches"]["3"]["models"]["code"]
    proj = model.base_model.model.model.layers[3].stitch_layer["default"].proj.of("code")
    matrix = proj(torch.eye(48)).T.detach()  # of which the identity is a part
    identity = torch.eye(32, 48)
    assert found["proj_distance"] == pytest.approx(((matrix - identity).norm() / identity.norm()).item(), rel=1e-4)
    assert found["gate_bias_rms"] is None and found["proj_shape"] == [32, 48]


def test_export(adapter, tmp_path):
    folder, model = adapter()
    assert json.loads(call("export", folder, tmp_path / "out", "--json").stdout) == {"folder": str(tmp_path / "out")}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(exported(input_ids=IDS).logits, logits(model), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--hub", "HUB", "--expert", "code=CODE", "--num-stitches", "9"), "num_stitches=9 does not fit"),
        (("plan", "--hub", "HUB", "--expert", "s=SHORT"), "'s' has 48 token embeddings"),
        (("plan", "--hub", "HUB", "--expert", "a.b=CODE"), "'a.b' is not usable"),
        (("check", "--hub", "NOTHING", "--expert", "code=CODE"), "hub's config could not be read"),
        (("inspect", "NOTHING"), "NOTHING"),
        (("inspect", "HUB"), "no adapter_config.json"),
        (("inspect", "LORA"), "is a LORA adapter, expected a STITCH adapter"),
        (("export", "NOTHING", "out"), "NOTHING"),
    ],
    ids=" ".join,
)
def test_problems(folders, arguments, message):
    """A problem is one line on stderr, no traceback, and exit code 1."""
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(folders / "lora")
    places = {"HUB": "hub", "CODE": "code", "SHORT": "short", "LORA": "lora"}
    for word, name in places.items():
        arguments = [a.replace(word, str(folders / name)) for a in arguments]
    result = call(*[a.replace("NOTHING", str(folders / "NOTHING")) for a in arguments], code=1)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"peft-bts {arguments[0]}: ")
    assert message in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--hub", "x"),
        ("check", "--hub", "x", "--expert", "code"),
        ("plan", "--hub", "x", "--expert", "a=b", "--expert", "a=c"),
        ("plan", "--hub", "x", "--expert", "a=b", "--gate", "head"),
        ("inspect",),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_usage(arguments):
    """A wrong call is exit code 2."""
    assert "Usage" in call(*arguments, code=2).stderr


def test_as_a_module():
    """`python -m peft_bts` is the same program."""
    command = [sys.executable, "-m", "peft_bts", "inspect", "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "peft-bts inspect: " in run.stderr and "Traceback" not in run.stderr
