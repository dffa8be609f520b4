"""Saved here, loaded in a process that has never heard of the models: the same bits."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.helpers.checkpoints import make, read, train_by_trainer
from tests.helpers.models import IDS, logits
from tests.helpers.zoo import tiny_model


OLD, NEW = "a" * 40, "b" * 40  # commits of a repository


FRESH = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig

torch.set_num_threads(1)
ids, folders, pickled, repository = torch.load(sys.argv[1])
results = {}

try:  # first of all, while peft_bts is not imported
    AutoPeftModelForCausalLM.from_pretrained(next(iter(folders.values())))
except KeyError as error:
    results["without import"] = str(error)

@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits

results["pickled"] = logits(torch.load(pickled, weights_only=False))  # finds peft_bts by itself

import peft_bts

for name, folder in folders.items():
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    results[name] = logits(model)
    results[name + " tokens"] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    del model

# Experts by id: offline, out of a hub cache. `main` moves on between save and load.
from pathlib import Path
from peft import get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained("org/seed"),
    peft_bts.StitchConfig(
        task_type="CAUSAL_LM",
        num_stitches=2,
        init_weights=False,
        experts={"code": "org/code", "pinned": {"model": "org/code", "revision": "v2"}},
    ),
)
model.attach_expert("late", "org/code")
model.attach_expert("later", "org/code", revision="v2")
before = logits(model)
model.save_pretrained(repository + "/saved")
(Path(repository) / "models--org--code" / "refs" / "main").write_text("b" * 40)
after = logits(AutoPeftModelForCausalLM.from_pretrained(repository + "/saved"))
results["hub"] = bool(torch.equal(before, after))
torch.save(results, sys.argv[2])
"""


def hub_cache(root, folder):
    """A cache of the Hugging Face Hub with org/seed, and org/code at two commits: `main` is the old, `v2` the new."""
    for repo, commits in {"seed": {OLD: "seed"}, "code": {OLD: "code", NEW: "moved"}}.items():
        for commit, source in commits.items():
            if source == "moved":
                tiny_model("llama", seed=9, width=48).save_pretrained(root / source)
            shutil.copytree(root / source, folder / f"models--org--{repo}" / "snapshots" / commit)
        refs = folder / f"models--org--{repo}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(OLD)
    (refs / "v2").write_text(NEW)


@pytest.fixture(scope="module")
def fresh(root, tmp_path_factory):
    """What models gave here, and what their folders give in a process that has never heard of them."""
    folder = tmp_path_factory.mktemp("fresh")
    models = {"trainer": make(root, num_stitches=4)}
    train_by_trainer(models["trainer"], folder / "run").save_model(str(folder / "trainer"))
    models["order"] = make(root, "")
    for name, source in [("zeta", "code"), ("alpha", "math"), ("_1", "law"), ("Z", "code")]:
        models["order"].attach_expert(name, str(root / source))
    models["lora"] = make(root, "lora code", gate="token", r=2)
    models["mine"] = make(root, adapter_name="mine", pattern="experts_into_hub")
    models["mixture"] = make(root, "code math lora", output="mixture")
    models["gates"] = make(root, "code law", output="mixture", num_stitches=0)
    models["evidence"] = make(root, "code law", output="mixture", evidence=0.8)
    expected = {}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        expected[name] = logits(model)
        expected[name + " tokens"] = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    torch.save(models["mixture"], folder / "pickled")
    expected["pickled"] = expected["mixture"]
    hub_cache(root, folder / "hub")

    folders = {name: str(folder / name / ("mine" if name == "mine" else "")) for name in models}
    torch.save((IDS, folders, str(folder / "pickled"), str(folder / "hub")), folder / "in")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "PATH": "", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "in"), str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return expected, torch.load(folder / "out"), folder


@pytest.mark.parametrize("name", ["trainer", "order", "lora", "mine", "mixture", "gates", "evidence", "pickled"])
def test_a_fresh_process_gives_the_same_model(fresh, name):
    """Trained here, loaded elsewhere: logits bitwise equal, whatever the order in which experts were attached."""
    expected, actual, _ = fresh
    for key in [key for key in expected if key.startswith(name)]:
        assert torch.equal(actual[key], expected[key])


def test_without_the_import_peft_raises_a_key_error(fresh):
    """A documented fact of PEFT, the reason for the import on every model card; if it changes, so may the docs."""
    _, actual, _ = fresh
    assert actual["without import"] == "'STITCH'"


def test_experts_by_id_are_pinned_to_their_commit(fresh):
    """An expert whose repository moves on must not change a trained model."""
    _, actual, folder = fresh
    experts = read(folder / "hub" / "saved")[1]["experts"]
    assert {name: (reference["model"], reference["revision"]) for name, reference in experts.items()} == {
        "code": ("org/code", OLD),
        "pinned": ("org/code", NEW),
        "late": ("org/code", OLD),
        "later": ("org/code", NEW),
    }
    assert actual["hub"] is True
