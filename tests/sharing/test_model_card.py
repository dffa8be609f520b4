"""The card of an adapter: how to load it, which models it needs, and what the user wrote."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peft_bts.install import how_to_install
from tests.helpers.checkpoints import config, load, make, train_by_trainer
from tests.helpers.models import logits
from tests.helpers.zoo import tiny_model


def check_card(folder, references):
    """The card has a working snippet, one section, a row for every expert and the tags; returns the snippet."""
    card = ModelCard.load(folder / "README.md")
    assert how_to_install() in card.text
    assert card.text.count("import peft_bts") == card.text.count("2502.00075](") == 1
    for name, place in references.items():
        assert re.search(rf"^\|[^|]*\b{name}\b[^|]*\|[^|]*{re.escape(str(place))}", card.text, re.MULTILINE)
    assert len(re.findall(r"^\| `", card.text, re.MULTILINE)) == len(references)
    assert {"stitch", "branch-train-stitch"} <= set(card.data.tags) and card.data.library_name == "peft"
    snippets = [block for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) if "peft_bts" in block]
    assert len(snippets) == 1
    return snippets[0]


def test_the_model_card(root, tmp_path):
    """Whoever finds the adapter learns from the card how to load it and which models it needs; the snippet runs."""
    model = make(root)
    model.save_pretrained(tmp_path)
    snippet = check_card(tmp_path, {"code": root / "code", "math": root / "math"})
    assert str(root / "seed") in (tmp_path / "README.md").read_text()
    found = {}
    exec(snippet.replace("path or id of this adapter", str(tmp_path)), found)
    assert torch.equal(logits(found["model"]), logits(model))


def test_saving_again_updates_the_card(root, tmp_path):
    """One section however often it is saved; it follows the experts, and what the user wrote stays."""
    model = make(root)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# Model Card for Model ID", "# My model") + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    model.detach_expert("math")
    model.attach_expert("law", str(root / "law"))
    model.save_pretrained(tmp_path)
    check_card(tmp_path, {"code": root / "code", "law": root / "law"})
    text = path.read_text()
    assert "# My model" in text and text.count("My own words.") == 1


def test_named_adapters_have_cards_beside_their_weights(root, tmp_path):
    """A subfolder is uploaded on its own; its card must name its own experts."""
    model = make(root)
    model.add_adapter("other", config(root, "law"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        check_card(tmp_path, {"code": root / "code", "math": root / "math"})
        check_card(tmp_path / "other", {"law": root / "law"})


def test_the_trainers_card_shows_the_import(root, tmp_path):
    """`Trainer.push_to_hub` writes a card of its own over the saved one; without the import nobody can load."""
    trainer = train_by_trainer(make(root), tmp_path, max_steps=1)
    trainer.save_model()
    trainer.create_model_card()
    check_card(tmp_path, {"code": root / "code", "math": root / "math"})


# ------------------------------------------------------------------------------------------------- what the tables say


def tables(folder):
    """The tables of a card, by the name of their first column: {row: {column: cell}}."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", (folder / "README.md").read_text(), re.MULTILINE):
        first, rule, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        assert set(rule) == {"---"} and all(len(row) == len(first) for row in rows)
        found[first[0]] = {row[0]: dict(zip(first[1:], row[1:])) for row in rows}
    return found


def thousands(tensors):
    return f"{sum(tensor.numel() for tensor in tensors) / 1000:.3g} k"


def test_the_table_of_experts(root, tmp_path):
    """What each model is, where it lies, and how many weights it adds to those above it; counted on the files."""
    model = make(root, "code lora")
    model.attach_expert("again", str(root / "code"))  # the model that is in memory already
    model.attach_expert("made", tiny_model("gpt2", seed=5, layers=3))
    model.attach_expert("other", {"model": str(root / "code"), "adapter": lora_of(root, "code", tmp_path / "lora")})
    model.save_pretrained(tmp_path / "saved")
    rows = tables(tmp_path / "saved")["expert"]
    assert list(rows) == ["seed", "`again`", "`code`", "`lora`", "`made`", "`other`"]
    code = "llama, 4 layers of width 48"
    assert {name: (row["model"], row["architecture"]) for name, row in rows.items()} == {
        "seed": (f"`{root / 'seed'}`", ""),
        "`again`": (f"`{root / 'code'}`", code),
        "`code`": (f"`{root / 'code'}`", code),
        "`lora`": (f"`{root / 'lora'}` (LoRA on `the seed`)", "llama, 4 layers of width 32"),
        "`made`": ("(a model object; give its place in the config before sharing)", "gpt2, 3 layers of width 32"),
        "`other`": (f"`{tmp_path / 'lora'}` (LoRA on `{root / 'code'}`)", code),
    }
    files = {name: list(load_file(root / name / "model.safetensors").values()) for name in ("seed", "code")}
    loras = {name: list(load_file(path / "adapter_model.safetensors").values())
             for name, path in (("lora", root / "lora"), ("other", tmp_path / "lora"))}  # fmt: skip
    assert rows["seed"]["parameters"] == thousands(files["seed"])
    assert sorted(rows[f"`{name}`"]["parameters"] for name in ("again", "code")) == ["0", thousands(files["code"])]
    assert rows["`lora`"]["parameters"] == thousands(loras["lora"])
    assert rows["`made`"]["parameters"] == thousands(tiny_model("gpt2", layers=3).parameters())
    assert rows["`other`"]["parameters"] == thousands([*files["code"], *loras["other"]])
    stitches = load_file(tmp_path / "saved" / "adapter_model.safetensors").values()
    assert f"stitches only ({thousands(stitches)} parameters)" in (tmp_path / "saved" / "README.md").read_text()


def lora_of(root, name, folder):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load(root, name), config).save_pretrained(folder)
    return str(folder)


def test_weights_of_other_adapters_are_on_no_card(root, tmp_path):
    """Two adapters on one hub: each card counts its own stitches, and the seed as it is without any."""
    model = make(root)
    model.add_adapter("other", config(root, "law", gate="token"))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        seed = load_file(root / "seed" / "model.safetensors").values()
        assert tables(folder)["expert"]["seed"]["parameters"] == thousands(seed)
        stitches = load_file(folder / "adapter_model.safetensors").values()
        assert f"stitches only ({thousands(stitches)} parameters)" in (folder / "README.md").read_text()


def test_the_table_of_results(root, tmp_path):
    """Rows and metrics in the order in which they were first named; a gap where a row has no such metric."""
    model = make(root)
    model.save_pretrained(tmp_path)
    assert tables(tmp_path).keys() == {"expert"} and "\n## Results" not in (tmp_path / "README.md").read_text()
    model.card_results = {"code": {"loss": 2.5}, "arithmetic": {"accuracy": 37.25, "loss": 0}, "law": {}}
    model.save_pretrained(tmp_path)
    results = tables(tmp_path)[""]
    assert list(results) == ["code", "arithmetic", "law"] and list(results["code"]) == ["loss", "accuracy"]
    assert [list(row.values()) for row in results.values()] == [["2.5", ""], ["0", "37.25"], ["", ""]]
    model.card_results = None
    model.save_pretrained(tmp_path)
    assert tables(tmp_path).keys() == {"expert"}


@pytest.mark.parametrize("results", [3, [1], {"code": 2.5}, {"code": {"loss": 2.5}, "law": None}], ids=str)
def test_results_that_are_none(root, tmp_path, results):
    """They are found when the card is written; what is there already stays as it was."""
    model = make(root)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    model.card_results = results
    with pytest.raises(ValueError, match=rf"card_results is {re.escape(repr(results))}; expected"):
        model.save_pretrained(tmp_path / "other")
    model.card_results = None
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


# ------------------------------------------------------------------------------------------------- what the user wrote


def test_tags(root, tmp_path):
    """Those of experts that are there, those of the user, and none twice; a detached expert's goes."""
    model = make(root)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    peft_says = set(card.data.tags) - {"code", "math", "stitch", "branch-train-stitch"}
    card.data.tags = [*card.data.tags, "mine", "mathematics"]
    card.data["license"] = "cc0-1.0"
    card.save(tmp_path / "README.md")
    model.detach_expert("math")
    model.attach_expert("law", str(root / "law"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    mine = {"mine", "mathematics", "code", "law", "stitch", "branch-train-stitch"}
    assert sorted(card.data.tags) == sorted(peft_says | mine)
    assert card.data.license == "cc0-1.0" and card.data.base_model_relation == "adapter"


def test_only_the_section_is_ours(root, tmp_path):
    """Whatever surrounds the section stays, line by line, and a second save changes nothing at all."""
    model, path = make(root), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    text = path.read_text()
    begin, end = (text.index(f"<!-- peft_bts: {mark} -->") for mark in ("begin", "end"))
    words = "\n".join(
        ["# Mine", "| `code` | is not | a row |", "```python", "import peft_bts", "```", "Ümläuts, $x$ \\\\ …"]
    )
    path.write_text(f"{text[: text.index('---', 4)]}---\n{words}\n\n{text[begin:]}\nThe end.\n")
    model.save_pretrained(tmp_path)
    once = path.read_text()
    assert words in once and once.count("The end.") == once.count("## Stitched experts") == 1
    assert text[begin:end] in once
    model.save_pretrained(tmp_path)
    assert path.read_text() == once


def test_a_section_that_was_cut_is_no_reason_to_lose_words(root, tmp_path):
    """Without its end mark the old section cannot be told from what follows: it stays, and a whole one is added."""
    model, path = make(root), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    path.write_text(path.read_text().replace("<!-- peft_bts: end -->", "Precious words."))
    model.save_pretrained(tmp_path)
    assert path.read_text().count("Precious words.") == 1
    assert path.read_text().count("<!-- peft_bts: end -->") == 1
