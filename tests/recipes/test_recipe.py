"""Recipes as files and flags: what they say, and what is refused before anything is loaded."""

import dataclasses

import pytest

from peft_bts import StitchConfig
from peft_bts.recipes.data import Domain
from peft_bts.recipes.options import StitchOptions
from peft_bts.recipes.recipe import RecipeParser, read_recipe


RECIPE = """
hub: org/seed@v2
experts:
  code: org/code
  math: {model: org/math, revision: v1}
datasets:
  code: src/*.py:15
  math: {source: math.jsonl, weight: 2.5}
evaluation:
  code: held-out.jsonl
num_stitches: 2
layers_to_stitch: [1, 3]
gate_bias: false
output_dir: out
learning_rate: 1e-4
lr_scheduler_kwargs: {min_lr: 1.0e-6}
bf16: true
use_cpu: true
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_file_and_flags(tmp_path):
    """Every key has the value of the file, or of its flag, which comes first, or its default."""
    recipe = read_recipe([write(tmp_path, RECIPE), "--r", "8", "--num-stitches=3", "--experts", "law=org/law"])
    assert recipe.hub == {"model": "org/seed", "revision": "v2"} and recipe.experts == {"law": "org/law"}
    assert recipe.domains == {"code": Domain("src/*.py", 15), "math": Domain("math.jsonl", 2.5)}
    assert recipe.evaluation == {"code": "held-out.jsonl"}
    expected = StitchConfig(
        task_type="CAUSAL_LM",
        experts={"law": "org/law"},
        revision="v2",
        num_stitches=3,
        layers_to_stitch=[1, 3],
        gate_bias=False,
        r=8,
    )
    assert recipe.config() == expected
    training = read_recipe([write(tmp_path, RECIPE), "--bf16", "False"]).training_arguments()
    assert (training.learning_rate, training.output_dir, training.bf16) == (1e-4, "out", False)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6} and training.eval_on_start


def test_flags_alone():
    recipe = read_recipe(["--hub", "org/seed", "--experts", "code=org/code", 'math={"adapter": "org/lora"}'])
    assert recipe.hub == "org/seed" and recipe.experts == {"code": "org/code", "math": {"adapter": "org/lora"}}


def test_written_and_read_again(tmp_path):
    """The copy in the adapter's folder is the recipe itself."""
    recipe = read_recipe([write(tmp_path, RECIPE), "--gate", "token"])
    again = read_recipe([write(tmp_path, recipe.to_yaml())])
    assert recipe.differs_from(again) is None and again.config() == recipe.config()
    assert again.training_arguments().learning_rate == 1e-4
    assert recipe.differs_from(read_recipe([write(tmp_path, RECIPE)])) == "gate"
    assert recipe.differs_from(read_recipe([write(tmp_path, recipe.to_yaml()), "--max_steps", "9"])) is None
    assert recipe.differs_from(read_recipe([write(tmp_path, recipe.to_yaml()), "--datasets", "a=b"])) == "datasets"


def test_help(capsys):
    """Every option of `StitchConfig` that users set is there, with its help, and all of `TrainingArguments`."""
    RecipeParser().print_help()
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(StitchOptions):
        assert f"--{field.name}" in text
    hidden = {f.name for f in dataclasses.fields(StitchConfig)} - {f.name for f in dataclasses.fields(StitchOptions)}
    assert not [name for name in hidden - {"experts"} if f"--{name} " in text]
    assert "Number of stitch layers, K. (default: 4)" in text and "--learning_rate" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1e-4", "unknown key 'learning_rte'; did you mean learning_rate"),
        ("hubs: org/seed", "unknown key 'hubs'; did you mean hub"),
        ("zzzzzzzz: 1", "unknown key 'zzzzzzzz'. `peft-bts train --help` lists all"),
        ("learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("max_steps: 2.5", "max_steps: invalid int value"),
        ("gate: head", "gate: invalid choice: 'head'"),
        ("bf16: maybe", "bf16: Truthy value expected"),
        ("hub: [a, b]", "hub takes one value"),
        ("num_stitches: {a: b}", "num_stitches takes one value"),
        ("gate:", "gate has no value"),
        ("experts: org/code", "experts takes a mapping"),
        ("experts: {code: {modle: org/code}}", "no key 'modle'; did you mean 'model'"),
        ("experts: {a.b: org/code}", "'a.b=org/code' is not of the form NAME=VALUE"),
        ("datasets: {code: {source: x, wieght: 3}}", "takes the keys source and weight"),
        ("datasets: {code: {source: x, weight: -1}}", "a weight of at least 0"),
        ("num_stitches: -1", "num_stitches must be a whole number of at least 0"),
        ("held_out: -1", "held_out must be at least 0"),
        ("- hub", "holds no keys"),
        ("a: [", "is no YAML"),
        ("", "holds no keys"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read_recipe([write(tmp_path, text)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rte", "1"], "no flag --learning_rte; did you mean --learning_rate"),
        (["--learning", "1"], "no flag --learning"),  # no abbreviations: they would change with the versions
        (["--max_steps", "many"], "max_steps: invalid int value"),
        (["--experts", "code"], "'code' is not of the form"),
        (["--experts", "a=x", "a=y"], "the name 'a' twice"),
        (["stray"], "'stray' belongs to no flag"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(flags)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no recipe .*nothing\.yaml"):
        read_recipe([str(tmp_path / "nothing.yaml")])
