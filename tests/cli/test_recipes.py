"""Commands that take a recipe: what it says stands in for their options, which come before it."""

import json
import shutil

import pytest
import torch
from datasets import config as datasets_config
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_bts_cli import app
from tests.helpers.models import IDS, logits
from tests.helpers.recipes import write_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    write_recipe(root)
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def call(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def found(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def write_changed(recipe, line):
    """Write a recipe with one more line beside another."""
    changed = recipe.with_name("changed.yaml")
    changed.write_text(f"{recipe.read_text().rstrip()}\n        {line}\n")
    return changed


def models(root):
    return ["--hub", root / "seed", "--expert", f"code={root}/code", "--expert", f"math={root}/math"]


def test_before_training(root):
    """`check`, `plan` and `assess` of a recipe find what they find by flags that say the same."""
    recipe = root / "recipe.yaml"
    assert found("check", recipe) == found("check", *models(root))
    assert list(found("check", recipe, "--expert", f"other={root}/code")["experts"]) == ["other"]
    options = ["--num-stitches", 2, "--gate", "token", "--gate-dropout", 0.1, "--r", 4, "--batch-size", 4]
    assert found("plan", recipe) == found("plan", *models(root), *options, "--sequence-length", 32)
    checkpointing = write_changed(recipe, "gradient_checkpointing: true")
    assert found("plan", checkpointing) == found("plan", recipe, "--gradient-checkpointing") != found("plan", recipe)
    assessed = found("assess", recipe, "--max-tokens", 200)
    files = {name: f"{root}/out/evaluation/{name}.jsonl" for name in ("code", "general")}
    assert assessed["files"] == {"math": f"{root}/math-test.jsonl", **files} and assessed["sequence_length"] == 32
    assert assessed["domains"].keys() == assessed["files"].keys()
    assert len((root / "out" / "evaluation" / "code.jsonl").read_text().splitlines()) == 6
    shutil.rmtree(root / "out")


def test_the_whole_story(root, tmp_path):
    """Train, look, evaluate, export: every command by the same file, after it the exported folder's logits."""
    recipe = root / "recipe.yaml"
    result = call("train", recipe, "--max_steps", 2, "--save_steps", 2, "--json")
    trained = json.loads(result.stdout)  # Trainer's own logs go to stderr
    assert trained["folder"] == str(root / "out") and trained["steps"] == 2
    card = (root / "out" / "README.md").read_text()
    assert f"\npeft-bts train {recipe} --max_steps 2 --save_steps 2\n" in card
    assert list(trained["losses"]) == ["seed alone", "before training", "after training"]

    evaluated = found("eval", recipe, "--device", "cpu")
    assert list(evaluated["stitched"]) == ["math", "code", "general"] and evaluated["sequence_length"] == 32
    assert sorted(evaluated["experts"]) == ["code", "math"]
    again = found("eval", recipe, "--device", "cpu", "--data", f"x={root}/math-test.jsonl", "--sequence-length", 16)
    assert list(again["stitched"]) == ["x"] and again["sequence_length"] == 16
    gates = found("gates", recipe, "--device", "cpu")
    assert [row["domain"] for row in gates["rows"]] == ["math", "code", "general"]
    assert list(found("gates", recipe, "--device", "cpu", "--text", "w3 w4")["data"]) == ["text"]
    assert found("inspect", recipe)["adapter"] == str(root / "out")
    found("export", recipe, tmp_path / "whole")
    model = AutoPeftModelForCausalLM.from_pretrained(root / "out").eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(exported(input_ids=IDS).logits, logits(model), atol=1e-5)

    text = call("train", recipe, "--max_steps", 4).stdout  # goes on, and prints tables
    assert "after training" in text and f"Wrote {root}/out, trained for 4 steps." in text.replace("\n", "")


def test_train_without_a_word():
    """Its help is that of the dataclasses, and what it takes is told if nothing is given."""
    text = call("train", "--help").stdout
    assert "--num_stitches" in text and "--learning_rate" in text and "--json" not in text
    assert "usage: peft-bts train [RECIPE.yaml]" in text
    assert "--num_stitches" in call("train", code=2).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "WRONG"), 1, "unknown key 'hubb'; did you mean hub?"),
        (("train", "RECIPE", "--learning_rte", "1"), 1, "no flag --learning_rte; did you mean --learning_rate?"),
        (("plan", "WRONG"), 1, "unknown key 'hubb'; did you mean hub?"),
        (("check", "NOTHING.yaml"), 1, "There is no recipe"),
        (("eval", "NOTHING.yaml"), 1, "There is no recipe"),
        (("check", "EMPTY"), 1, "The recipe has no hub and no experts"),
        (("inspect", "EMPTY"), 1, "The recipe has no output_dir"),
        (("push", "EMPTY", "a/b"), 1, "The recipe has no output_dir"),
        (("check", "notes.txt"), 2, "'notes.txt' is no recipe"),
        (("check",), 2, "--hub"),
        (("eval", "somewhere"), 2, "--data"),
        (("push", "somewhere"), 2, "org/stitch"),
        (("push", "somewhere", "a/b"), 1, "There is no folder somewhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_problems(root, tmp_path, arguments, code, message):
    """One line on stderr, or a usage message; nothing is loaded, and no traceback is shown."""
    (tmp_path / "wrong.yaml").write_text("hubb: org/seed")
    (tmp_path / "empty.yaml").write_text("num_stitches: 2")
    places = {"WRONG": tmp_path / "wrong.yaml", "EMPTY": tmp_path / "empty.yaml", "RECIPE": root / "recipe.yaml"}
    result = call(*(places.get(word, word) for word in arguments), code=code)
    assert message in " ".join(result.stderr.split()) and not result.stdout
    assert code == 2 or (result.stderr.startswith(f"peft-bts {arguments[0]}: ") and result.stderr.count("\n") == 1)
