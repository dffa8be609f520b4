"""Experts that are lost, broken, changed or of the wrong kind: each error names the expert and says what to do."""

import json
import re
import shutil
from contextlib import suppress

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig, check_compatibility
from tests.helpers.bad_input import every_load_refused, load, refused, save, stitched
from tests.helpers.models import assert_near, expected_logits, fresh, logits, pristine, randomize, stitch


def replace_as_documented(adapter, name, source):
    """What the message says to do."""
    config = StitchConfig.from_pretrained(adapter / "adapter")
    config.experts[name]["model"] = str(source)
    return AutoPeftModelForCausalLM.from_pretrained(adapter / "adapter", config=config)


def test_lost_expert(adapter):
    """An expert that is no longer there: which, where it was, and how to say where it is now."""
    shutil.move(adapter / "code", adapter / "moved")
    match = rf"(?s)'code' could not be loaded from '{adapter}/code'.*config\.experts\[.code.\]\[.model.\] = "
    with pytest.raises(ValueError, match=match) as error:
        load(adapter)
    for line in (
        "config = StitchConfig.from_pretrained(",
        'config.experts["code"]["model"] = ',
        "AutoPeftModelForCausalLM.from_pretrained(",
    ):
        assert line in str(error.value)
    assert torch.equal(
        logits(replace_as_documented(adapter, "code", adapter / "moved")), torch.load(adapter / "logits.pt")
    )
    with every_load_refused(adapter, match):
        shutil.move(adapter / "moved", adapter / "code")


def test_lost_expert_of_the_hub():
    """An id that the Hub does not have, or cannot be asked for: named with its revision."""
    model = stitched()
    with refused(model, match=r"(?s)'new' could not be loaded from 'org/nothing' at revision 'v2'.*"):
        model.attach_expert("new", "org/nothing", revision="v2")
    with refused(model, match=r"(?s)'new' could not be loaded from 'org/nothing'"):
        model.attach_expert("new", {"adapter": "org/nothing"})


@pytest.mark.parametrize("place", ["/no/such/folder", "./none", "a/b/c", "~/none"])
def test_a_path_where_nothing_is(place):
    """The Hub is not asked for what cannot be an id; and advice on loading is for those who load an adapter."""
    model = stitched()
    match = rf"^Expert 'new' could not be loaded from '{place}': there is no such folder as '{place}'\.$"
    for reference in (place, {"adapter": place}):
        with refused(model, match=match):
            model.attach_expert("new", reference)


def test_broken_expert(adapter):
    """A folder that has a config but no weights, or no model at all."""
    (adapter / "code" / "model.safetensors").rename(adapter / "weights")
    match = rf"(?s)'code' could not be loaded from '{adapter}/code'"
    with every_load_refused(adapter, match):
        (adapter / "weights").rename(adapter / "code" / "model.safetensors")
    (adapter / "empty").mkdir()
    model = stitched()
    with refused(model, match=rf"'new' could not be loaded from '{adapter}/empty'"):
        model.attach_expert("new", str(adapter / "empty"))


@pytest.mark.parametrize(("layers", "match"), [(10**9, "more than any model has"), (40, "its weights are 39 tensors")])
def test_layers_that_a_config_only_claims(adapter, layers, match):
    """Sizes are not believed before memory is taken for them; of all sizes, depth alone needs no weights."""
    config = (adapter / "code" / "config.json").read_text()
    claims = json.loads(config) | {"num_hidden_layers": layers}
    (adapter / "code" / "config.json").write_text(json.dumps(claims))
    match = f"(?s)'code' could not be loaded from.*its config.json has num_hidden_layers={layers}, .*{match}"
    with every_load_refused(adapter, match):
        if layers > 4096:
            report = check_compatibility(str(adapter / "hub"), str(adapter / "code"), name="code")
            assert not report.ok and re.search(match, report.errors[0])
        (adapter / "code" / "config.json").write_text(config)


def test_expert_that_came_from_nowhere(tmp_path):
    """An expert attached as an object has no place to be loaded from; the message says how to give it one."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", None))
    model = stitch(hub, {"code": fresh("llama", seed=1)})
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"(?s)'code' has no reference.*config\.experts\[.code.\]\[.model.\] = "):
        load(tmp_path)
    path = save(tmp_path / "expert", None, seed=1)
    assert torch.equal(logits(replace_as_documented(tmp_path, "code", path)), logits(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": 6}, r"num_hidden_layers is 6, expected 4"),
        ({"width": 48}, r"hidden_size is 48, expected 32"),
        ({"vocab": 80}, r"vocab_size is 80, expected 64"),
        ({"arch": "qwen3"}, r"model_type is 'qwen3', expected 'llama'"),
    ],
    ids=str,
)
def test_changed_expert(adapter, options, match):
    """Another model in the place of the one that the stitches were trained for."""
    kept = adapter / "kept"
    shutil.move(adapter / "code", kept)
    save(adapter / "code", None, base=fresh(**({"arch": "llama", "seed": 1} | options)))
    with every_load_refused(adapter, rf"(?s)'code' is not the one.*{match}.*config\.experts\[.code.\]"):
        shutil.rmtree(adapter / "code")
        shutil.move(kept, adapter / "code")


def bring_code(folder, flag, **auto_map):
    """Put a module into a model's folder that leaves a flag when it is imported, and makes nothing that works."""
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nraise ImportError('evil')\n")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            content = json.loads((folder / file).read_text())
            model_type = {} if "AutoTokenizer" in auto_map else {"model_type": "evil"}
            content |= {"auto_map": auto_map, "tokenizer_class": "Evil"} | model_type
            (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_references_run_no_code(adapter, monkeypatch, answer):
    """A folder or id that a downloaded config names cannot make a loader run its code, nor ask whether to."""
    asked, flag = [], adapter / "flag"
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or answer)
    shutil.copytree(adapter / "code", adapter / "evil")
    bring_code(adapter / "evil", flag, AutoConfig="evil.C", AutoModelForCausalLM="evil.M")
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('"../code"', '"../evil"'))
    assert path.read_text() != text
    with suppress(Exception):
        load(adapter)
    assert not flag.exists() and not asked
    with every_load_refused(adapter, rf"(?s)'code' could not be loaded from '{adapter}/evil'"):
        path.write_text(text)


def test_trust_cannot_be_asked_for(adapter):
    """A downloaded config cannot say that its experts are to be trusted."""
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    trusting = json.loads(text)
    trusting["experts"]["code"]["trust_remote_code"] = True
    path.write_text(json.dumps(trusting))
    with every_load_refused(adapter, r"'code'.*\['trust_remote_code'\]"):
        path.write_text(text)


def test_tokenizers_run_no_code(tmp_path, monkeypatch):
    """Comparing tokenizers loads none that brings code along, and does not ask whether to."""
    asked, flag = [], tmp_path / "flag"
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    path = save(tmp_path / "expert")
    bring_code(tmp_path / "expert", flag, AutoTokenizer=["evil.T", "evil.T"])
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub"))
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    with suppress(Exception):
        model.attach_expert("new", path)
    assert not flag.exists() and not asked


def test_a_path_means_its_files(adapter):
    """A path is loaded, even if a model that once came from there, and was changed since, is an expert already."""
    changed = AutoModelForCausalLM.from_pretrained(adapter / "code")
    with torch.no_grad():
        changed.lm_head.weight.zero_()
        changed.model.layers[1].mlp.down_proj.weight.zero_()
    model = stitch(fresh("llama"), {"changed": changed})
    model.attach_expert("code", str(adapter / "code"))
    randomize(model)
    expected = expected_logits(model, pristine("llama"), {"changed": changed, "code": pristine("llama", seed=1)})
    assert_near(logits(model), expected, 1e-4)


def test_adapters_that_cannot_be_experts(tmp_path, adapter):
    """A stitch adapter or a soft prompt in the place of an expert."""
    prompt = get_peft_model(fresh("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    model = stitched()
    for folder, kind in [(tmp_path / "prompt", "PROMPT_TUNING"), (adapter / "adapter", "STITCH")]:
        with refused(model, match=rf"(?s)'new'.*{folder}.*{kind}.*cannot be experts"):
            model.attach_expert("new", str(folder))


def test_lora_of_another_hub(tmp_path):
    """A LoRA that does not fit the hub it claims to be of."""
    lora = get_peft_model(fresh("llama", width=48), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    model = stitched()
    with refused(model, match="'new'", error=(ValueError, RuntimeError)):
        model.attach_expert("new", str(tmp_path))
