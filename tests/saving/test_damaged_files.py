"""Weights that cannot be loaded leave nothing behind, and a file gives an adapter no tensors but its own.

PEFT makes an adapter before it reads the weights. Whatever is wrong with them, the hub, or the model that the adapter
was to be loaded onto, is what it was before, bit for bit, and a second load works.
"""

import json
import re
import shutil
from contextlib import contextmanager

import peft.peft_model
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.bad_input import refused, stitched
from tests.helpers.models import fresh, logits, randomize


STITCH = "base_model.model.model.layers.3.stitch_layer"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A seed and an expert on disk."""
    root = tmp_path_factory.mktemp("models")
    fresh("llama").save_pretrained(root / "seed")
    fresh("llama", seed=1, vocab=80).save_pretrained(root / "code")
    return root


def seed(models):
    return AutoModelForCausalLM.from_pretrained(models / "seed")


def saved(models, folder, hub=None, **options):
    """Save an adapter; return what it says."""
    saving = options.pop("saving", {})
    config = StitchConfig(task_type="CAUSAL_LM", num_stitches=2, experts={"code": str(models / "code")}, **options)
    model = randomize(get_peft_model(seed(models) if hub is None else hub, config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1)
    model.save_pretrained(folder, **saving)
    return logits(model)


WAYS = {
    "onto a hub": lambda models, folder: PeftModel.from_pretrained(seed(models), folder),
    "meta": lambda models, folder: PeftModel.from_pretrained(seed(models), folder, low_cpu_mem_usage=True),
    "auto": lambda models, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
}


@contextmanager
def every_load_refused(models, folder, match):
    """Every way to load raises this; a load onto the same hub and the same model works when the file is mended."""
    hub, other = seed(models), stitched(num_stitches=2)
    for load in WAYS.values():
        with pytest.raises(ValueError, match=match):
            load(models, folder)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        with refused(hub, match=match):
            PeftModel.from_pretrained(hub, folder, **options)
    assert not hasattr(hub, "peft_config")
    with refused(other, match=match):
        other.load_adapter(folder, "second")
    yield
    model = PeftModel.from_pretrained(hub, folder)
    other.load_adapter(folder, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other.eval()), logits(model.eval()))


# -------------------------------------------------------------------------------------------------------- the file


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def half_a_header(file):
    file.write_bytes(file.read_bytes()[:100])


def emptied(file):
    file.write_bytes(b"")


def something_else(file):
    file.write_bytes(b"<html>404</html>" * 99)


def missing(file):
    file.unlink()


def a_pickle_that_is_none(file):
    file.unlink()
    file.with_name("adapter_model.bin").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (truncated, "adapter_model.safetensors': .*not fully covered"),
        (half_a_header, "adapter_model.safetensors': .*header"),
        (emptied, "adapter_model.safetensors': .*header"),
        (something_else, "adapter_model.safetensors': .*header"),
        (missing, "adapter_model.safetensors': there is no such file"),
        (a_pickle_that_is_none, "adapter_model.bin': "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_a_damaged_file(models, tmp_path, damage, match, output):
    """Cut off by a full disk, a page instead of a download: the error names the file."""
    expected = saved(models, tmp_path / "adapter", output=output)
    shutil.copytree(tmp_path / "adapter", tmp_path / "good")
    damage(tmp_path / "adapter" / "adapter_model.safetensors")
    with every_load_refused(models, tmp_path / "adapter", f"could not be loaded from '{tmp_path}/adapter/{match}"):
        shutil.rmtree(tmp_path / "adapter")
        shutil.move(tmp_path / "good", tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)


def test_a_damaged_file_in_a_subfolder(models, tmp_path):
    """An adapter with a name of its own."""
    saved(models, tmp_path / "adapter" / "mine")
    emptied(tmp_path / "adapter" / "mine" / "adapter_model.safetensors")
    hub = seed(models)
    with refused(hub, match="adapter/mine/adapter_model.safetensors"):
        PeftModel.from_pretrained(hub, tmp_path / "adapter", subfolder="mine")


def test_an_adapter_that_was_there_stays(models, tmp_path):
    """A file loaded into an adapter in use, as Trainer does when it resumes: its weights stay what they were."""
    saved(models, tmp_path)
    model = PeftModel.from_pretrained(seed(models), tmp_path)
    truncated(tmp_path / "adapter_model.safetensors")
    with refused(model, match="adapter_model.safetensors"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("way", ["new hub", "second adapter"])
def test_an_interrupted_load(models, tmp_path, monkeypatch, way):
    """Ctrl+C while the weights are read, or are put in their places, is no reason to leave an untrained adapter."""
    saved(models, tmp_path)
    for function in ("load_peft_weights", "set_peft_model_state_dict"):
        with monkeypatch.context() as patch:
            patch.setattr(peft.peft_model, function, interrupt)
            model = seed(models) if way == "new hub" else stitched()
            with refused(model, match="^$", error=KeyboardInterrupt):
                PeftModel.from_pretrained(model, tmp_path) if way == "new hub" else model.load_adapter(tmp_path, "b")
        PeftModel.from_pretrained(model, tmp_path) if way == "new hub" else model.load_adapter(tmp_path, "b")


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_lora_elsewhere_is_none_of_ours(models, tmp_path):
    """PEFT's other methods fail as they do without this package."""
    get_peft_model(seed(models), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    truncated(tmp_path / "adapter_model.safetensors")
    with pytest.raises(Exception, match="not fully covered") as error:
        PeftModel.from_pretrained(seed(models), tmp_path)
    assert type(error.value).__name__ == "SafetensorError"


# --------------------------------------------------------------------------------- modules trained with the stitches


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "down_proj"])
@pytest.mark.parametrize("wrong", ["missing", "misshapen"])
def test_modules_to_save(models, tmp_path, module, wrong):
    """Their tensors are the adapter's too: all must be there, in their shapes."""
    saved(models, tmp_path / "adapter", modules_to_save=[module])
    shutil.copytree(tmp_path / "adapter", tmp_path / "whole")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(f"{module}.weight"))
    if wrong == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
        match = rf"(?s)adapter_model.safetensors': .*missing: {re.escape(key)}"
    else:
        save_file({**tensors, key: tensors[key][:, 1:].clone()}, file)
        match = rf"(?s)adapter_model.safetensors': .*{module}.*weight has shape .*, expected "
    model = PeftModel.from_pretrained(seed(models), tmp_path / "whole")
    with refused(model, match=match.partition("': ")[2]):
        set_peft_model_state_dict(model, load_file(file))
    with every_load_refused(models, tmp_path / "adapter", match):
        save_file(tensors, file)


# ------------------------------------------------------------------------------------------- tensors of other modules


@pytest.fixture
def crowded(models, tmp_path):
    """A hub with two adapters, both of which train the head; and what the second one's file says."""
    saved(models, tmp_path / "first", modules_to_save=["lm_head"])
    saved(models, tmp_path / "second", modules_to_save=["lm_head"])
    model = PeftModel.from_pretrained(seed(models), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", "second")
    return model, tmp_path / "second" / "adapter_model.safetensors"


FOREIGN = {
    "embeddings of the hub": "base_model.model.model.embed_tokens.weight",
    "a layer of the hub": "base_model.model.model.layers.0.mlp.up_proj.weight",
    "a stitched layer of the hub": "base_model.model.model.layers.3.base_layer.mlp.up_proj.weight",
    "the head, under the adapter's": "base_model.model.lm_head.original_module.weight",
    "another adapter's head": "base_model.model.lm_head.modules_to_save.first.weight",
    "another adapter's stitch": f"{STITCH}.first.gate.for_hub.weight",
    "embeddings of an expert": "base_model.experts.first.code.model.model.embed_tokens.weight",
    "the head of an expert": "base_model.experts.second.code.model.lm_head.weight",
}


@pytest.mark.parametrize("key", FOREIGN.values(), ids=FOREIGN)
def test_weights_that_are_not_the_adapters(models, crowded, key):
    """A file cannot overwrite the hub, an expert or another adapter, though all of these have such a tensor."""
    model, file = crowded
    old = model.state_dict()[key]
    tensors = load_file(file)
    save_file({**tensors, key: torch.zeros_like(old)}, file)
    match = rf"(?s)adapter_model.safetensors'.*not part of this adapter: {re.escape(key)}"
    with refused(model, match=match):
        model.load_adapter(file.parent, "third")
    with refused(model, match=match):
        model.load_adapter(file.parent, "second")
    with refused(model, match=rf"not part of this adapter: {re.escape(key)}"):
        set_peft_model_state_dict(model, load_file(file), adapter_name="second")


@pytest.mark.parametrize("key", ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"])
def test_embedding_layers_that_nobody_asked_for(models, tmp_path, key):
    """What an adapter does to the hub's own head stays when it is disabled; so it takes more than a key in a file."""
    saved(models, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, key: torch.zeros(64, 32)}, file)
    with every_load_refused(models, tmp_path, rf"(?s)not part of this adapter: {key}.*save_embedding_layers"):
        save_file(tensors, file)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_embedding_layers_that_the_user_asked_for(models, tmp_path, options):
    """`save_embedding_layers=True` saves them, and says so in the config; loading puts them into the hub."""
    hub = seed(models)
    hub.model.embed_tokens.weight.data += 0.1
    expected = saved(models, tmp_path, hub, saving={"save_embedding_layers": True}, **options)
    for load in WAYS.values():
        assert torch.equal(logits(load(models, tmp_path).eval()), expected)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values.pop("save_embedding_layers") is True
    path.write_text(json.dumps(values))
    with every_load_refused(models, tmp_path, r"(?s)not part of this adapter.*save_embedding_layers"):
        path.write_text(json.dumps({**values, "save_embedding_layers": True}))
    saved(models, tmp_path, **options)
    assert "save_embedding_layers" not in json.loads(path.read_text())


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_a_resized_hub(models, tmp_path, options):
    """With added tokens, PEFT saves the embedding layers unasked; they load onto a hub that has the tokens too."""
    hub = seed(models)
    hub.resize_token_embeddings(70)
    expected = saved(models, tmp_path, hub, **options)
    assert expected.shape[-1] == 70
    again = seed(models)
    with refused(again, match=r"(?s)lm_head.*has been resized"):
        PeftModel.from_pretrained(again, tmp_path)
    again.resize_token_embeddings(70)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path).eval()), expected)
