"""The scripts in examples/ do what they say. The quickstart: test_quickstart.py.

Slow tests run them as users do, in processes of their own; the others in this one, which has torch imported already.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from peft_bts.recipes.data import Domain
from tests.helpers.text import save_model, word_tokenizer, write_documents


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DOMAINS = {"general": 1, "code": 2, "math": 3, "law": 4}
ROWS = ["--block_size", "32", "--held_out", "6"]
TRAINING = [*["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--seed", "0"]]
TRAINING += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed, two experts and data of four domains."""
    root = tmp_path_factory.mktemp("examples")
    for number, name in enumerate(("seed", "code", "math")):
        save_model(root / name, seed=number)
    for name, number in DOMAINS.items():
        write_documents(root / f"{name}.jsonl", number)
    return root


@pytest.fixture
def common(monkeypatch, tmp_path):
    """The scripts' shared module, with a cache of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import common
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return common


def data(root, *names):
    """--dataset for domains, such as "code:2"."""
    values = [name.partition(":") for name in names]
    return ["--dataset", *(f"{name}={root / name}.jsonl{colon}{weight}" for name, colon, weight in values)]


def run_here(monkeypatch, script, *arguments):
    """A script in this process; needs the fixture `common`."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def run(root, script, *arguments, launcher=(sys.executable,)):
    """A script in a process of its own; return what it printed, or fail with it."""
    environment = os.environ | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(EXAMPLES / script), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def read_losses(folder):
    """The losses by domain that train_stitch.py wrote."""
    metrics = json.loads((folder / "eval_results.json").read_text())
    return {key.removeprefix("eval_").removesuffix("_loss"): metrics[key] for key in metrics if key.endswith("_loss")}


def logged(checkpoint):
    """The names of all that was logged up to a checkpoint."""
    return {
        key for entry in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"] for key in entry
    }


def word_rows(path):
    """The documents of a file as rows of tokens; all are equally long."""
    tokenizer = word_tokenizer()
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return torch.tensor(tokenizer(texts)["input_ids"])


def loss_of(model, rows):
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


# -------------------------------------------------------------------------------------------------------- the parts


def test_experts_on_the_command_line(common, tmp_path):
    (tmp_path / "a@b").mkdir()
    experts = common.parse_experts(["code=org/code", "math=org/math@v2", f"law={tmp_path}/a@b"])
    assert experts == {
        "code": {"model": "org/code"},
        "math": {"model": "org/math", "revision": "v2"},
        "law": {"model": f"{tmp_path}/a@b"},
    }
    for wrong in (["org/code"], ["code="], ["code=a", "code=b"]):
        with pytest.raises(ValueError, match="--expert"):
            common.parse_experts(wrong)


def test_datasets_on_the_command_line(common):
    domains = common.parse_datasets(["code=src/*.py:15", "web=org/web/en"])
    assert domains == {"code": Domain("src/*.py", 15), "web": Domain("org/web/en", 1)}
    for wrong in (["src/*.py"], ["code="], ["code=a", "code=b"]):
        with pytest.raises(ValueError, match="--dataset"):
            common.parse_datasets(wrong)


def test_mixture_of_rows(common, tmp_path):
    """Documents are held out before rows are made of them."""
    write_documents(tmp_path / "a.jsonl", 1, count=10, length=11)
    packing = partial(common.pack, tokenizer=word_tokenizer(), arguments=common.PackingArguments(block_size=4))
    mixed, held_out = common.load_domains(common.DataArguments([f"a={tmp_path}/a.jsonl"], held_out=2), packing)
    assert len(mixed) == 8 * 3 and len(held_out["a"]) == 2 * 3


def test_rows_longer_than_a_model_takes(common, root):
    """Of the seed alone, and of the hub and its experts; they have 128 positions."""
    seed = AutoModelForCausalLM.from_pretrained(root / "seed")
    common.check_block_size(128, seed)
    with pytest.raises(ValueError, match="block_size 129 is more than the 128 positions of the model"):
        common.check_block_size(129, seed)
    model = get_peft_model(seed, StitchConfig(task_type="CAUSAL_LM", experts={"code": str(root / "code")}))
    common.check_block_size(128, model)
    model.base_model.experts["default"]["code"].model.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match="block_size 65 is more than the 64 positions of expert 'code'"):
        common.check_block_size(65, model)


def test_kinds_of_rows(common):
    """TRL would find out amid the data, and then only that something is None."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    script = runpy.run_path(str(EXAMPLES / "train_stitch_trl.py"))
    text, chat, other = (Dataset.from_list([{name: "x", "id": 1}]) for name in ("text", "messages", "body"))
    check = script["one_kind"]()
    assert check(text) is text and check(text) is text
    with pytest.raises(ValueError, match="one kind; one has 'text', another 'messages'"):
        check(chat)
    with pytest.raises(ValueError, match=r"found \['body', 'id'\]"):
        script["one_kind"]()(other)


def test_a_branch_that_fails(common, root, tmp_path, monkeypatch):
    """The process of the branch says why; what comes after it is one line."""
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    arguments = ["--seed_model", root / "seed", "--branches", "code", *data(root, "code"), "--output_dir", tmp_path]
    with pytest.raises(SystemExit, match=r"Branch 'code' was not trained \(exit code 3\)"):
        run_here(monkeypatch, "branch_experts.py", *arguments, *TRAINING)


# ------------------------------------------------------------------------------------------------------ the scripts


def test_train_stitch(root, tmp_path, common, monkeypatch):
    """The adapter's folder loads, the losses are its own, and the seed's tokenizer lies beside it."""
    out = tmp_path / "out"
    names = ["--hub", root / "seed", "--expert", f"code={root / 'code'}", "--expert", f"math={root / 'math'}"]
    options = [
        "--num_stitches",
        2,
        "--gate",
        "token",
        "--gate_bias",
        "False",
        "--r",
        4,
        "--max_steps",
        4,
        "--save_steps",
        4,
    ]
    datasets = data(root, "code:2", "math", "general:0")
    run_here(monkeypatch, "train_stitch.py", *names, *datasets, *ROWS, *options, *TRAINING, "--output_dir", out)
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    config = model.active_peft_config
    assert (config.num_stitches, config.gate, config.gate_bias, config.r) == (2, "token", False, 4)
    assert {name: reference["model"] for name, reference in config.experts.items()} == {
        "code": str(root / "code"),
        "math": str(root / "math"),
    }
    assert (out / "tokenizer.json").exists()
    assert sorted(read_losses(out)) == ["code", "general", "math"]
    assert {"loss", "gate/layer_3/hub", "gate/layer_3/code", "gate_entropy/layer_3"} <= logged(out / "checkpoint-4")


def test_train_stitch_trl(root, tmp_path, common, monkeypatch):
    """The same by SFTTrainer, packed."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    names = ["--hub", root / "seed", "--expert", f"code={root / 'code'}", f"math={root / 'math'}"]
    options = ["--num_stitches", 2, "--max_steps", 4, "--packing", "--max_length", 64, "--held_out", 6]
    options += ["--bf16", "False", "--eval_strategy", "steps", "--eval_steps", 2, "--output_dir", tmp_path / "out"]
    options += ["--save_steps", 4]
    run_here(monkeypatch, "train_stitch_trl.py", *names, *data(root, "code:2", "math"), *options, *TRAINING)
    expected = {"loss", "eval_code_loss", "eval_math_loss", "gate/layer_3/hub", "gate_entropy/layer_3"}
    assert expected <= logged(tmp_path / "out" / "checkpoint-4")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.active_peft_config.num_stitches == 2
    assert torch.isfinite(torch.tensor(loss_of(model, word_rows(root / "code.jsonl"))))


@pytest.mark.slow
def test_train_stitch_under_accelerate(root, tmp_path):
    """`accelerate launch` with one process gives what plain `python` gives; an interrupted run can be resumed."""
    names = ["--hub", root / "seed", "--expert", f"code={root / 'code'}", f"math={root / 'math'}"]
    options = [*data(root, "code:2", "math"), *ROWS, *TRAINING, "--max_steps", 4, "--save_steps", 2]
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    run(root, "train_stitch.py", *names, *options, "--output_dir", tmp_path / "plain")
    run(root, "train_stitch.py", *names, *options, "--output_dir", tmp_path / "launched", launcher=launch)
    plain, launched = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "launched"))
    assert plain.keys() == launched.keys() and all(torch.equal(plain[key], launched[key]) for key in plain)
    assert read_losses(tmp_path / "plain") == read_losses(tmp_path / "launched")

    longer = [*options, "--output_dir", tmp_path / "plain", "--resume_from_checkpoint", "last", "--max_steps", 6]
    run(root, "train_stitch.py", *names, *longer)
    state = json.loads((tmp_path / "plain" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_whole_story(root, tmp_path):
    """Branch, stitch, add an expert: every expert learns its domain, and so does what is made of them."""
    story = [*ROWS, *TRAINING]
    run(
        root,
        "branch_experts.py",
        *["--seed_model", root / "seed", "--branches", "code", "math", "law", "--output_dir", tmp_path / "experts"],
        *data(root, "code:4", "math:4", "law:4", "general:1"),
        *[*story, "--max_steps", 40],
    )
    held_out = {name: word_rows(root / f"{name}.jsonl") for name in DOMAINS}
    seed = AutoModelForCausalLM.from_pretrained(root / "seed")
    before = {name: loss_of(seed, rows) for name, rows in held_out.items()}
    for name in ("code", "math", "law"):
        expert = AutoModelForCausalLM.from_pretrained(tmp_path / "experts" / name)
        learned = {domain: before[domain] - loss_of(expert, rows) for domain, rows in held_out.items()}
        assert learned[name] == max(learned.values()) and learned[name] > 0.5, (name, learned)

    experts = [f"{name}={tmp_path / 'experts' / name}" for name in ("code", "math")]
    run(
        root,
        "train_stitch.py",
        *["--hub", root / "seed", "--expert", *experts, "--output_dir", tmp_path / "stitched", "--num_stitches", 2],
        *data(root, "code", "math", "general"),
        *[*story, "--max_steps", 30, "--eval_strategy", "steps", "--eval_steps", 10],
    )
    stitched = read_losses(tmp_path / "stitched")
    assert all(stitched[name] < before[name] - 0.5 for name in ("code", "math"))

    printed = run(
        root,
        "add_expert.py",
        *["--adapter", tmp_path / "stitched", "--expert", f"law={tmp_path / 'experts' / 'law'}", "--new_steps", 20],
        *data(root, "code", "math", "general", "law"),
        *[*story, "--max_steps", 20, "--output_dir", tmp_path / "added"],
    )
    table = {}
    for line in printed.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 5 and cells[0]:
            table[cells[0]] = dict(zip(("code", "math", "general", "law"), map(float, cells[1:])))
    assert list(table) == ["before", "attached", "new weights trained", "all weights trained"]
    assert table["before"] == pytest.approx(stitched | {"law": table["before"]["law"]}, abs=6e-4)
    assert table["all weights trained"]["law"] < table["new weights trained"]["law"] < table["before"]["law"]

    old = load_file(tmp_path / "stitched" / "adapter_model.safetensors")
    first, second = (load_file(tmp_path / "added" / f / "adapter_model.safetensors") for f in ("new-weights", "."))
    assert all(torch.equal(first[key], old[key]) for key in old)
    assert first.keys() == second.keys() and all(".law." in key for key in first.keys() - old.keys())
    assert any(not torch.equal(second[key], old[key]) for key in old)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "added")
    assert isinstance(model, PeftModel) and sorted(model.active_peft_config.experts) == ["code", "law", "math"]
