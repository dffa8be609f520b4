"""`peft-bts push`: an adapter, its card and its tokenizer, and the models that exist only here."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from typer.testing import CliRunner

from peft_bts_cli import app
from tests.helpers.models import logits
from tests.helpers.recipes import write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, run):
    """A recipe that was trained for a step."""
    root = tmp_path_factory.mktemp("recipes")
    path = write_recipe(root)
    run(_command, "train", path, "--max_steps", "1")
    return path


def _command(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def _logits(place):
    return logits(AutoPeftModelForCausalLM.from_pretrained(place).eval())


def test_push(run, hub, recipe):
    """From a recipe; a stranger loads it, and gets the same logits, the tokenizer, and a card that says all."""
    where = ("ann/recipe", "--experts-to", "ann/recipe-{name}", "--seed-to", "ann/recipe-seed", "--public", "--json")
    code, output, errors = run(_command, "push", recipe, *where, token="hf_ann", empty_cache=True)
    assert code == 0, errors
    assert json.loads(output)["uploaded"] == {
        "hub": "ann/recipe-seed",
        "code": "ann/recipe-code",
        "math": "ann/recipe-math",
        "adapter": "ann/recipe",
    }
    files = hub.repos["ann/recipe"].files("main")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert "## Training" in card.text and 'from_pretrained("ann/recipe")' in card.text
    assert card.data.base_model == "ann/recipe-seed"
    folder = recipe.replace("recipe.yaml", "out")
    assert torch.equal(run(_logits, "ann/recipe", empty_cache=True), run(_logits, folder))


def test_nothing_is_pushed_that_others_cannot_load(run, hub, recipe):
    before = set(hub.repos)
    code, _, errors = run(_command, "push", recipe, "ann/alone", token="hf_ann")
    assert code == 1 and "Others could not load this adapter" in errors
    code, _, errors = run(_command, "push", recipe, "ann/alone", "--seed-to", "ann/alone-seed", token="hf_ann")
    assert code == 1 and "exist only here are ['code', 'math']" in errors
    assert set(hub.repos) == before
