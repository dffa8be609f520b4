"""The README and the pages in docs/: their code runs, their commands, links and error messages exist."""

import ast
import json
import os
import random
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments, cache_utils, logging

import peft_bts
from peft_bts import StitchConfig
from peft_bts.recipes.recipe import RecipeParser
from peft_bts_cli import app
from tests import ROOT
from tests.helpers.models import fresh
from tests.helpers.pages import blocks, run_blocks
from tests.helpers.text import document, save_model, token_rows, word_tokenizer


PAGES = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
]


# ------------------------------------------------------------------------------------------------------- Python blocks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the pages' names stand for: a seed, experts, LoRAs of the seed, and an adapter on two of the experts."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("seed", "seed-code", "seed-math", "seed-bio", "seed-law", "law")):
        save_model(root / "org" / name, seed=number, width=64)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    for name in ("seed-law-lora", "seed-tax-lora"):
        seed = fresh("llama", width=64)
        seed.name_or_path = seed.config._name_or_path = "org/seed"
        get_peft_model(seed, lora).save_pretrained(root / "org" / name)
    shutil.copytree(root / "org" / "seed-math", root / "new" / "place")
    return root


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A working directory with the models."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    logging.set_verbosity_error()
    yield tmp_path
    logging.set_verbosity_warning()


def save_adapter():
    """`my-stitch`, for pages that begin with one."""
    config = StitchConfig(
        task_type="CAUSAL_LM", experts={"code": "org/seed-code", "math": "org/seed-math"}, init_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("org/seed"), config)
    model.save_pretrained("my-stitch")
    word_tokenizer().save_pretrained("my-stitch")
    return model


def trainer_arguments():
    return TrainingArguments("trained", max_steps=2, logging_steps=1, report_to="none", use_cpu=True)


def readme(page):
    given = {"args": trainer_arguments(), "mixed_data": token_rows(), "tokenizer": word_tokenizer()}
    given |= {"law_model": fresh("llama", width=64), "path": "org/law"}
    given["inputs"] = word_tokenizer()("w3 w4", return_tensors="pt")
    names = run_blocks(page, given)
    assert sorted(names["model"].active_peft_config.experts) == ["bio", "code", "math", "tax"]


def experts(page):
    for name in ("seed", "seed-math"):
        shutil.copytree(f"org/{name}", f"moved/{name}")
    names = run_blocks(page)
    loaded = names["smaller"].base_model.experts["default"]
    assert loaded["code"].model.is_loaded_in_4bit and loaded["math"].model.is_loaded_in_4bit
    assert names["model"].active_peft_config.experts["math"]["model"] == "moved/seed-math"
    assert names["model"].get_base_model().name_or_path == "moved/seed"
    assert sorted(names["again"].active_peft_config.experts) == ["code", "law", "math"]
    assert names["again"].active_peft_config.experts["math"]["quantization_config"]["load_in_4bit"]
    assert names["model"](torch.arange(3, 9)[None]).logits.isfinite().all()


def training(page):
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    names = run_blocks(page)
    assert sorted(names["model"].active_peft_config.experts) == ["code", "law", "math"]
    files = [load_file(f"{folder}/adapter_model.safetensors") for folder in ("my-stitch", "my-dpo-stitch")]
    assert files[0].keys() == files[1].keys() and not os.path.exists("my-dpo-stitch/ref")


def distributed(page):
    accelerator = Accelerator(cpu=True)
    before = accelerator.prepare(save_adapter())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
            patch.setenv(name, str(value))
        try:
            run_blocks(page, {"accelerator": accelerator, "model": before})
        finally:
            torch.distributed.destroy_process_group()
    assert AutoModelForCausalLM.from_pretrained("seed-tax").config.hidden_size == 64


def inference(page):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("the page shows what newer versions of transformers can do")
    save_adapter()
    assert run_blocks(page)["out"].logits.isfinite().all()


def gates(page):
    save_adapter()
    names = run_blocks(page, {"args": trainer_arguments(), "data": token_rows(8)})
    assert {row["domain"] for row in names["rows"]} == {"math", "code"} and '"rows"' in names["text"]
    assert {"gates.png", "domains.png", "gates.html"} <= set(os.listdir())


def planning(page):
    texts = [document(3, 10, random.Random(seed)) for seed in range(4)]
    names = run_blocks(page, {"code_documents": texts, "math_documents": texts})
    assert names["report"].ok and names["estimate"].to_dict()["batch_size"] == 1
    assert names["assessment"].verdict in ("nothing", "gates", "stitches")


def concepts(page):
    run_blocks(page)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} == set(os.listdir("my-stitch"))


def serving(page):
    save_adapter()
    run_blocks(page)
    config = json.loads(Path("folder", "config.json").read_text())
    assert config["architectures"] == ["StitchExportForCausalLM"] and Path("folder", "tokenizer_config.json").exists()


def troubleshooting(page):
    save_adapter()
    assert run_blocks(page)["model"].active_peft_config.experts["math"]["model"] == "new/place"


def demo(page):
    gradio = pytest.importorskip("gradio", reason="needs peft_bts[demo]")
    save_adapter()
    served = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradio.Blocks, "launch", lambda app, **options: served.append((app, options)))
        names = run_blocks(page)
    assert served == [(names["demo"], {})] and names["demo"].title == "My stitched model"


STORIES = {"README.md": readme} | {
    f"docs/{story.__name__}.md": story
    for story in (concepts, demo, distributed, experts, gates, inference, planning, serving, training, troubleshooting)
}

ELSEWHERE = ["docs/sharing.md"]  # needs a Hub, which test_sharing.py has


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE])
def test_python(page, here):
    """Every block of a page, one after another, as a reader would run them. A new page needs a story above."""
    STORIES[page](page)


# ------------------------------------------------------------------------------------------------------ shell commands


def commands(page):
    """(program, arguments) of the shell commands of a page that this repository has, or makes."""
    spans = re.findall(r"`((?:peft-bts|make|python) [^`]+)`", (ROOT / page).read_text())
    text = "\n".join([*blocks(page, "bash"), *spans]).replace("\\\n", " ")
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        for program in ("peft-bts", "peft_bts", "make"):
            if program in words[:4] and words[-1] != program:
                yield program.replace("_", "-"), words[words.index(program) + 1 :]
        yield from (
            (word, words[i + 1 :]) for i, word in enumerate(words) if re.match(r"examples/.*py|benchmarks\.", word)
        )


def options(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def known_options(script, monkeypatch, capsys):
    """What the `--help` of a script, or of a module, says it takes."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(SystemExit):
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_commands(page, monkeypatch, capsys):
    """The commands that a page shows exist, and have the options that it gives them."""
    ours = typer.main.get_command(app).commands
    for program, words in commands(page):
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif program == "peft-bts" and words[0] == "train":
            RecipeParser().given([word for word in words[1:] if not word.endswith(".yaml") and word != "--help"])
        elif program == "peft-bts" and words[0] != "run":
            known = {
                name for parameter in ours[words[0]].params for name in [*parameter.opts, *parameter.secondary_opts]
            }
            assert options(words) <= known, words
        elif program != "peft-bts":
            assert options(words) <= known_options(program, monkeypatch, capsys), (program, words)


# ------------------------------------------------------------------------------------------------- links and messages


def anchors(page):
    """The places within a page that a link can name, as GitHub calls them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Files, pages and headings that a page links to are there."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names(page):
    """What a page says is tested, is tested there: the files exist."""
    named = set(re.findall(r"tests/[\w/]*(?:\.py)?", (ROOT / page).read_text()))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_index():
    """docs/README.md names every page."""
    named = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_reference():
    """The pages in docs/api/, from which `make docs` makes the reference, have every public name once."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: peft_bts\.(\w+)$", page.read_text(), re.MULTILINE)]
    assert sorted(named) == sorted(peft_bts.__all__)


def texts_in_code():
    """All strings of the package; what f-strings fill in is `...`."""
    for path in (ROOT / "peft_bts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_messages():
    """Every message in docs/troubleshooting.md is one of the package's, but for those marked as others'."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"\*\*`([^`]+)`\*\*(?! from)", page)
    plain = [text.replace("`", "") for text in texts_in_code()]
    assert len(quoted) > 30
    for message in quoted:
        parts = ".*".join(re.escape(part) for part in message.split("..."))
        assert any(re.search(parts, text) for text in plain), message
