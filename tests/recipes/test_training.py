"""`train`: what it makes of a recipe, and what an interruption changes, namely nothing."""

import json
import shutil

import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from peft_bts.recipes.recipe import read_recipe
from peft_bts.recipes.training import last_checkpoint, train
from tests.helpers.recipes import write_recipe
from tests.helpers.text import word_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed, two experts, data of three domains, and a recipe."""
    root = tmp_path_factory.mktemp("recipes")
    write_recipe(root)
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Packed rows are cached: each test has a cache of its own."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(root, out, *flags):
    return read_recipe([str(root / "recipe.yaml"), "--output_dir", str(out), *flags])


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def rows_of(documents, tokenizer):
    """The documents, an end behind each, as rows of 32."""
    tokens = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)


def test_train(root, tmp_path):
    """The adapter loads; losses on the card are those of seed and adapter; the recipe and tokenizer lie beside it."""
    out = tmp_path / "out"
    found = train(recipe(root, out), "peft-bts train recipe.yaml")
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(out).eval(), word_tokenizer()
    options = model.active_peft_config
    assert (options.num_stitches, options.gate, options.gate_dropout, options.r) == (2, "token", 0.1, 4)
    assert (found.folder, found.steps, found.is_main) == (str(out), 6, True) and (out / "tokenizer.json").exists()

    texts = [json.loads(line)["text"] for line in (root / "math-test.jsonl").read_text().splitlines()]
    rows = rows_of(texts, tokenizer)
    seed = AutoModelForCausalLM.from_pretrained(root / "seed")
    with torch.no_grad():
        for who, one in (("seed alone", seed), ("after training", model)):
            assert found.losses[who]["math"] == pytest.approx(one(input_ids=rows, labels=rows).loss.item(), rel=1e-4)
    for losses in found.losses.values():
        assert list(losses) == ["math", "code", "general"]
    assert found.losses["after training"]["code"] < found.losses["before training"]["code"]

    card = ModelCard.load(out / "README.md").text
    assert "peft-bts train recipe.yaml\n" in card and "trained for 6 steps" in card
    for name, share in (("code", "66.7%"), ("math", "33.3%")):
        assert f"| {name} | `{root}/{name}.jsonl` | {share} |" in card
    for who, losses in found.losses.items():
        assert f"| {who} | {' | '.join(f'{loss:.4f}' for loss in losses.values())} |" in card
    again = read_recipe([str(out / "recipe.yaml")])
    assert again.differs_from(recipe(root, out)) is None and f"hub: {root}/seed\n" in card


def test_an_interrupted_run_is_continued(root, tmp_path, monkeypatch):
    """A second call goes on from the last whole checkpoint: same weights to the bit, same losses."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(recipe(root, whole), "whole")
    step, calls = Trainer.training_step, []

    def until_the_fifth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", until_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(root, cut), "cut")
    assert last_checkpoint(cut) == str(cut / "checkpoint-4") and not (cut / "adapter_model.safetensors").exists()
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-5")  # killed while it was written
    (cut / "checkpoint-5" / "trainer_state.json").write_text('{"half')
    with pytest.raises(ValueError, match="checkpoints of another recipe, which differs in r"):
        train(recipe(root, cut, "--r", "5"), "cut")

    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs))
    calls.clear()
    found = train(recipe(root, cut), "cut")
    assert len(calls) == 2 and found.steps == 6 and found.losses == expected.losses
    assert weights(cut).keys() == weights(whole).keys()
    assert all(torch.equal(weights(cut)[key], value) for key, value in weights(whole).items())
    card = ModelCard.load(cut / "README.md").text
    assert card.count("## Training\n") == 1 and "| before training |" in card

    calls.clear()
    again = train(recipe(root, cut), "cut")  # there is nothing left to do
    assert not calls and again.steps == 6 and again.losses == expected.losses
    assert all(torch.equal(weights(cut)[key], value) for key, value in weights(whole).items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datasets", "code={root}/nothing.jsonl"], "There is no file"),
        (["--evaluation", "code={root}/nothing.jsonl"], "There is no file"),
        (["--held_out", "60"], "Domain 'code' has 60 document.*none is left"),
        (["--text_column", "body"], "no column 'body'"),
        (["--block_size", "4096"], "not one whole row of tokens to train on"),
        (["--block_size", "300"], "evaluation data of domain .* not one whole row of 300 tokens"),
        (["--datasets", "code={root}/code.jsonl:0"], "nothing to train on"),
        (["--experts", "code={root}/nothing"], "nothing"),
        (["--hub", "{root}/nothing"], "nothing"),
        (
            ["--block_size", "129", "--held_out", "20", "--evaluation", "math={root}/math.jsonl"],
            "129 .* the 128 positions of the hub",
        ),
        (["--num_stitches", "9"], "num_stitches=9 does not fit"),
        (["--lr_scheduler_type", "nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_models_are_loaded(root, tmp_path, monkeypatch, flags, message):
    if not {"--num_stitches", "129"} & {*flags}:  # these are for the stitched model to say
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        train(recipe(root, tmp_path / "out", *(flag.replace("{root}", str(root)) for flag in flags)), "")
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_must_have(tmp_path):
    with pytest.raises(ValueError, match="no experts and no datasets and no output_dir"):
        train(read_recipe(["--hub", "org/seed"]), "")
