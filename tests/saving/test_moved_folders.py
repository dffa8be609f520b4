"""A folder with an adapter and its models can be moved; what lies elsewhere, or has gone elsewhere, can be named."""

import json
import os
import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from peft_bts import StitchConfig
from peft_bts.places import MARK
from tests.helpers.checkpoints import config, load, make, read, save_models
from tests.helpers.models import assert_near, logits
from tests.helpers.zoo import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A project: models, and an adapter beside them that has full models and a LoRA as experts; and its logits."""
    project = tmp_path_factory.mktemp("saved") / "project"
    save_models(project)
    make_adapter(project, project / "stitched")
    return project, logits(AutoPeftModelForCausalLM.from_pretrained(project / "stitched"))


def make_adapter(project, folder):
    model = make(project)
    model.attach_expert("tax", str(project / "lora"))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def moved(saved, tmp_path, monkeypatch):
    """The project at another place, none of it at its old one, and another working directory."""
    project, expected = saved
    shutil.copytree(project, tmp_path / "moved")
    project.rename(project.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "moved", expected
    project.with_name("gone").rename(project)


def sources(adapter):
    """What stands in the file: the seed, and every expert's adapter or model."""
    values = read(adapter)[1]
    experts = {name: ref.get("adapter") or ref["model"] for name, ref in values["experts"].items()}
    return {"hub": values["base_model_name_or_path"], **experts}, values.get(MARK)


def test_what_is_beside_the_adapter_is_written_relative_to_it(saved):
    places = {"hub": "../seed", "code": "../code", "math": "../math", "tax": "../lora"}
    assert sources(saved[0] / "stitched") == (places, "adapter")


def test_a_folder_moves_as_a_whole(moved):
    project, expected = moved
    model = AutoPeftModelForCausalLM.from_pretrained("moved/stitched")
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].experts["code"]["model"] == str(project / "code")
    model = PeftModel.from_pretrained(load(project, "seed"), project / "stitched")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(project / "again")
    assert sources(project / "again") == sources(project / "stitched")


def test_a_link_to_an_adapter_leads_to_its_models(moved):
    project, expected = moved
    os.symlink(project / "stitched", "latest")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("latest")), expected)


def test_below_above_and_far_away(saved, tmp_path, monkeypatch):
    """Models below and around the adapter are written relative to it, others with their absolute paths."""
    project, _ = saved
    model = make(project, "code")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project / "math", "run/out/math")
    shutil.copytree(project / "law", "run/law")
    model.attach_expert("math", "run/out/math")
    model.attach_expert("law", "run/law")
    model.save_pretrained("run/out")
    places = {"hub": str(project / "seed"), "code": str(project / "code"), "math": "./math", "law": "../law"}
    assert sources(tmp_path / "run/out") == (places, "adapter")
    expected = logits(model)
    os.rename("run", "ran")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("ran/out")), expected)

    model = make(project, "code")
    model.save_pretrained(tmp_path / "ran" / "far")
    assert sources(tmp_path / "ran" / "far")[1] is None


def test_an_adapter_in_the_folder_of_its_seed(saved, tmp_path):
    shutil.copytree(saved[0] / "seed", tmp_path / "seed")
    model = make(saved[0], "code")
    model.base_model.model.name_or_path = str(tmp_path / "seed")
    model.save_pretrained(tmp_path / "seed" / "stitched")
    model.save_pretrained(tmp_path / "seed")
    assert sources(tmp_path / "seed" / "stitched")[0]["hub"] == ".."
    assert sources(tmp_path / "seed")[0]["hub"] == "."
    for folder in (tmp_path / "seed", tmp_path / "seed" / "stitched"):
        seed = StitchConfig.from_pretrained(folder).base_model_name_or_path
        assert seed == str(tmp_path / "seed")


@pytest.mark.parametrize("here", ["", "./", "../work/"])
def test_files_without_the_mark_load_as_before(saved, tmp_path, monkeypatch, here):
    """Older files have paths relative to the working directory, whatever lies at these places from the adapter on."""
    work = tmp_path / "work"
    shutil.copytree(saved[0], work)
    values = read(work / "stitched")[1]
    del values[MARK]
    values["base_model_name_or_path"] = f"{here}seed"
    for name in ("code", "math"):
        values["experts"][name]["model"] = f"{here}{name}"
    values["experts"]["tax"]["adapter"] = f"{here}lora"
    (work / "stitched" / "adapter_config.json").write_text(json.dumps(values))
    for decoy in (work / "stitched" / "code", tmp_path / "work" / "work" / "code"):
        tiny_model("llama", seed=9, width=48).save_pretrained(decoy)
    monkeypatch.chdir(work)
    model = AutoPeftModelForCausalLM.from_pretrained("stitched")
    assert torch.equal(logits(model), saved[1])
    model.save_pretrained("again")
    assert sources(work / "again") == sources(saved[0] / "stitched")


def test_a_moved_seed_is_named_in_the_config(moved, tmp_path):
    """The error says how, doing that works, and what is saved afterwards names the new place."""
    project, expected = moved
    (project / "seed").rename(tmp_path / "seed-2")
    with pytest.raises(
        OSError, match=r"(?s)moved/seed', and there is no such folder.*config.base_model_name_or_path = "
    ):
        AutoPeftModelForCausalLM.from_pretrained(project / "stitched")
    edited = StitchConfig.from_pretrained(project / "stitched")
    edited.base_model_name_or_path = str(tmp_path / "seed-2")
    model = AutoPeftModelForCausalLM.from_pretrained(project / "stitched", config=edited)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(project / "again")
    assert sources(project / "again")[0]["hub"] == str(tmp_path / "seed-2")
    AutoPeftModelForCausalLM.from_pretrained(project / "again")
    with pytest.raises(OSError, match="there is no such folder"):  # nothing is left of that config
        AutoPeftModelForCausalLM.from_pretrained(project / "stitched")


def test_a_seed_that_was_loaded_from_another_place_is_noted(moved, tmp_path):
    project, _ = moved
    (project / "seed").rename(project / "seed-2")
    model = PeftModel.from_pretrained(load(project, "seed-2"), project / "stitched")
    model.save_pretrained(project / "again")
    assert sources(project / "again")[0]["hub"] == "../seed-2"


def test_an_expert_that_nobody_will_find(saved, tmp_path):
    """Said when it is attached, and when it is saved; then its place can be noted, and the adapter loads."""
    model = make(saved[0], "code")
    expert = PeftModel.from_pretrained(load(saved[0], "seed"), saved[0] / "lora")
    with pytest.warns(UserWarning, match="'tax' came from no id or path.*attach the folder"):
        model.attach_expert("tax", expert)
    with pytest.warns(UserWarning, match=r"(?s)cannot be loaded as it is.*'tax'.*save_pretrained\(folder\)"):
        model.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="'tax' has no reference"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lost")
    expert.save_pretrained(tmp_path / "tax")
    model.peft_config["default"].experts["tax"]["adapter"] = str(tmp_path / "tax")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cannot be loaded as it is")
        model.save_pretrained(tmp_path / "found")
    assert_near(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "found")), logits(model), 1e-5)


def test_the_id_of_a_seed_stays(saved, tmp_path):
    """A copy of a repository serves as the seed here; others have the repository."""
    shutil.copytree(saved[0] / "stitched", tmp_path / "stitched")
    file = tmp_path / "stitched" / "adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": "org/seed", "experts": {}}
    file.write_text(json.dumps(values))
    handed_over = StitchConfig.from_pretrained(tmp_path / "stitched")
    handed_over.experts = config(saved[0]).experts | {"tax": {"model": None, "adapter": str(saved[0] / "lora")}}
    model = PeftModel.from_pretrained(load(saved[0], "seed"), tmp_path / "stitched", config=handed_over)
    model.save_pretrained(tmp_path / "again")
    assert sources(tmp_path / "again")[0]["hub"] == "org/seed"
