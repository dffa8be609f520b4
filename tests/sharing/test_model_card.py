"""The card of an adapter: how to load it, which models it needs, and what the user wrote."""

import re

import torch
from huggingface_hub import ModelCard

from tests.helpers.checkpoints import config, make, train_by_trainer
from tests.helpers.models import logits


def check_card(folder, references):
    """The card has a working snippet, one section, a row for every expert and the tags; returns the snippet."""
    card = ModelCard.load(folder / "README.md")
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
