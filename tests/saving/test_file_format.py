"""The adapter folder is a contract: other tools read it, and years later it must give the same model, bitwise."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

from tests.helpers.checkpoints import assert_same, config, load, make, read


def test_the_file_to_the_letter(root, tmp_path):
    """Keys, shapes and dtypes that other tools rely on; any change here breaks every adapter that was ever saved."""
    make(root).save_pretrained(tmp_path)
    tensors, _ = read(tmp_path)
    layers = "base_model.model.model.layers"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{layers}.1.stitch_layer.gate.code.weight": (48, 32),  # Hub-into-Experts
        f"{layers}.1.stitch_layer.gate.code.bias": (48,),
        f"{layers}.1.stitch_layer.gate.math.weight": (32, 32),
        f"{layers}.1.stitch_layer.gate.math.bias": (32,),
        f"{layers}.1.stitch_layer.proj.code.weight": (48, 32),
        f"{layers}.1.stitch_layer.proj.math.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.hub.weight": (32, 32),  # Experts-into-Hub
        f"{layers}.3.stitch_layer.gate.hub.bias": (32,),
        f"{layers}.3.stitch_layer.gate.code.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.code.bias": (32,),
        f"{layers}.3.stitch_layer.gate.math.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.math.bias": (32,),
        f"{layers}.3.stitch_layer.proj.code.weight": (32, 48),
        f"{layers}.3.stitch_layer.proj.math.weight": (32, 32),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
@pytest.mark.parametrize("hub", ["seed", "law"])
@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("gate_bias", [True, False])
@pytest.mark.parametrize("layers, into_hub", [([0, 2], [False, True]), ([1, 2], [True, True])])
def test_keys_and_shapes_of_every_option(root, tmp_path, adapter_name, hub, r, gate, gate_bias, layers, into_hub):
    """One tensor per model and role whatever the options, and the adapter's own name is nowhere."""
    layers = layers if hub == "law" else [layers[0], 3]
    model = get_peft_model(
        load(root, hub),
        config(
            root,
            "code",
            layers_to_stitch=layers,
            pattern="experts_into_hub" if all(into_hub) else "alternating",
            r=r,
            gate=gate,
            gate_bias=gate_bias,
        ),
        adapter_name=adapter_name,
    )
    model.save_pretrained(tmp_path)
    tensors, _ = read(tmp_path if adapter_name == "default" else tmp_path / adapter_name)
    expected = {}
    for layer, experts_into_hub in zip(layers, into_hub):
        path = f"base_model.model.{'model.layers' if hub == 'seed' else 'transformer.h'}.{layer}.stitch_layer"
        d_out, d_in = (32, 48) if experts_into_hub else (48, 32)
        for name in ["hub", "code"] if experts_into_hub else ["code"]:
            rows = 1 if gate == "token" else d_out
            expected[f"{path}.gate.{name}.weight"] = (rows, 32)
            if gate_bias:
                expected[f"{path}.gate.{name}.bias"] = (rows,)
        if r is None:
            expected[f"{path}.proj.code.weight"] = (d_out, d_in)
        else:
            expected[f"{path}.proj.code.down.weight"] = (r, d_in)
            expected[f"{path}.proj.code.up.weight"] = (d_out, r)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected


def test_detaching_deletes_keys_and_attaching_adds_keys(root, tmp_path):
    """Expert by expert, so that a file can be edited without understanding fused weights."""
    model = make(root)
    model.save_pretrained(tmp_path / "both")
    model.detach_expert("math")
    model.save_pretrained(tmp_path / "code")
    model.attach_expert("law", str(root / "law"))
    model.save_pretrained(tmp_path / "code_law")
    both, code, code_law = (read(tmp_path / name)[0] for name in ("both", "code", "code_law"))
    assert_same(code, {key: tensor for key, tensor in both.items() if ".math." not in key})
    assert_same({key: tensor for key, tensor in code_law.items() if ".law." not in key}, code)
    assert {re.sub("law", "math", key) for key in code_law} == both.keys()


def test_the_config_to_the_letter(root):
    """Everything needed to build the model again, and nothing that could make a loader run code."""
    model = make(root, "math", num_stitches=3, r=2, gate="token", gate_dropout=0.1)
    model.attach_expert("code", str(root / "code"))
    model.attach_expert("lora", str(root / "lora"))
    model.save_pretrained(root / "to_the_letter")
    _, saved = read(root / "to_the_letter")
    assert saved["peft_type"] == "STITCH" and saved["task_type"] == "CAUSAL_LM" and saved["inference_mode"] is True
    assert saved["base_model_name_or_path"] == "../seed" and saved["peft_version"] == peft.__version__
    options = ("num_stitches", "layers_to_stitch", "pattern", "expert_streams", "gate", "gate_bias", "gate_dropout")
    assert [saved[option] for option in options] == [3, None, "alternating", "intact", "token", True, 0.1]
    assert (saved["r"], saved["init_weights"], saved["modules_to_save"]) == (2, False, None)

    own = {*options, "output", "experts", "r", "init_weights", "modules_to_save", "target_modules"}
    assert saved.pop("paths_relative_to") == "adapter"  # only where there are such paths
    assert set(saved) == own | {field.name for field in dataclasses.fields(PeftConfig)}

    seed = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64}
    experts = {name: {k: v for k, v in ref.items() if v is not None} for name, ref in saved["experts"].items()}
    assert experts == {
        "math": {"model": "../math", "config": seed | {"model_type": "qwen3", "num_hidden_layers": 6}},
        "code": {"model": "../code", "config": seed | {"hidden_size": 48}},
        "lora": {"adapter": "../lora", "config": seed},
    }
    assert "trust_remote_code" not in json.dumps(saved)
    gates = make(root, "math", output="mixture", evidence=0.5)
    assert gates.peft_config["default"].to_dict().keys() - saved.keys() == {"evidence"}


def test_a_config_file_cannot_ask_for_trust(root, tmp_path):
    """A downloaded adapter_config.json must not be able to switch `trust_remote_code` on."""
    make(root).save_pretrained(tmp_path)
    _, saved = read(tmp_path)
    saved["experts"]["code"]["trust_remote_code"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="trust_remote_code"):
        PeftModel.from_pretrained(load(root, "seed"), tmp_path)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("answer", ["y", "n"])
def test_an_experts_code_is_never_run(root, tmp_path, monkeypatch, part, answer):
    """Loading a stitch must not run Python out of an expert's repository, not even if the user is asked and says y."""
    evil = tmp_path / "evil"
    shutil.copytree(root / "code", evil)
    (evil / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'harm')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    if part == "model":
        auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        settings = json.loads((evil / "config.json").read_text()) | {"model_type": "evil", "auto_map": auto_map}
        (evil / "config.json").write_text(json.dumps(settings))
    else:
        settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
        (evil / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or answer)
    refused = pytest.raises(ValueError, match=re.escape(str(evil))) if part == "model" else nullcontext()
    with refused:
        make(root, "math").attach_expert("evil", str(evil))
    assert not (tmp_path / "harm").exists()
    assert not asked


def test_saving_a_loaded_model_gives_the_same_folder(root, tmp_path):
    """Load and save must be a fixed point, or adapters decay from hand to hand."""
    make(root, "code math lora").save_pretrained(tmp_path / "first")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    (first, first_config), (second, second_config) = read(tmp_path / "first"), read(tmp_path / "second")
    assert_same(second, first)
    assert second_config == first_config
    assert (tmp_path / "second" / "README.md").read_text() == (tmp_path / "first" / "README.md").read_text()
