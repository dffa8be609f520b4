"""The toy's data are what they say, and its models are kept. That they learn is for `make quickstart` to show."""

import itertools
import random

import pytest
import torch

from peft_bts import toy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return toy.Toy(tmp_path_factory.mktemp("toy"), smoke=True)


def test_arithmetic_is_right():
    tasks = toy.arithmetic_tasks(random.Random(0))
    assert len(tasks) == len(set(tasks)) == 90 * 10 * 2
    assert all(int(answer[::-1]) == eval(prompt.removesuffix("=")) for prompt, answer in tasks)
    assert ("47+8=", "550") in tasks


def test_translations_follow_the_rules():
    tasks = dict(toy.translation_tasks(random.Random(1), 2000))
    assert len(tasks) == 2000
    for english, esperanto in tasks.items():
        verb = next(word for word in esperanto.split() if word[-1] == "s")
        assert verb.endswith("os") == (" will " in english)
        subject, thing = (part.split() for part in esperanto.split(f" {verb} "))
        assert all(word == "la" or word.rstrip("j")[-1] in "oa" for word in subject)
        assert all(word == "la" or word[-1] == "n" for word in thing)


def test_no_test_item_is_trained_on(made):
    assert all(documents.keys() == toy.DOMAINS.keys() for documents in made.documents.values())
    for domain in toy.TASKS:
        train, validation, test = (set(made.documents[split][domain]) for split in ("train", "validation", "test"))
        assert validation and test and not train & validation and not train & test and not validation & test


def test_sources_are_split_by_file(tmp_path):
    """Docstrings and code of a file go to the same split, and neither contains the other."""
    text = "This is prose that is long enough to be counted as prose, and number {} of one hundred."
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(f'def f{i}():\n    """{text.format(i)}"""\n    return {i}\n')
    documents = toy.read_python(root=tmp_path)
    found = {split: [text for _, text in parts["text"]] for split, parts in documents.items()}
    assert sorted(itertools.chain(*found.values())) == sorted(text.format(i) for i in range(100))
    assert all(found.values())
    for split, parts in documents.items():
        assert [f"def f{prose.split()[-4]}():" for prose in found[split]] == [
            code.partition("\n")[0] for _, code in parts["code"]
        ]
        assert not any("prose" in code for _, code in parts["code"])
    (tmp_path / "m0.py").unlink()
    with pytest.raises(FileNotFoundError, match="has 99 Python sources"):
        toy.read_python(root=tmp_path)


def test_blocks(made):
    """All tokens in order; prompts are not learned, but what opens and ends a document is."""
    documents = {"math": [("47+8=", "550"), ("10-1=", "900")]}
    blocks = toy.make_blocks(made.tokenizer, documents, "test", length=9)["math"]
    assert blocks.shape == (2, 2, 9)
    assert made.tokenizer.decode(blocks[:, 0].flatten()) == f"{toy.END}47+8=550{toy.END}10-1=900"
    assert made.tokenizer.decode([token for token in blocks[0, 1] if token != -100]) == f"{toy.END}550"


def test_mixture_goes_through_all_blocks_before_any_again():
    blocks = {"a": torch.arange(3).view(3, 1, 1), "b": torch.arange(10, 90).view(80, 1, 1)}
    rows = toy.mix_blocks(blocks, {"a": 0.25, "b": 0.75}, 28).flatten().tolist()
    assert sorted(rows[:7]) in ([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2])
    assert len(rows) == 28 and len(set(rows[7:])) == 21


@pytest.mark.slow
def test_models_are_kept(made, capsys):
    """A model is trained once; another object with the same settings finds it, `fresh` makes the same again."""
    code = made.folder("code")
    assert (
        made.folder("seed").parent == code.parent == made.cache_dir and "from the cache" not in capsys.readouterr().out
    )
    weights, made_at = (code / "model.safetensors").read_bytes(), code.stat().st_mtime_ns
    assert toy.Toy(made.cache_dir, smoke=True).folder("code") == code and code.stat().st_mtime_ns == made_at
    assert "code: from the cache" in capsys.readouterr().out
    assert toy.Toy(made.cache_dir, smoke=True, fresh=True).folder("code") == code
    assert code.stat().st_mtime_ns > made_at and (code / "model.safetensors").read_bytes() == weights
