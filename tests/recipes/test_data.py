"""Documents of domains: read, held out, packed and mixed."""

import datasets
import pytest
from datasets import Dataset

from peft_bts.recipes.data import Domain, as_domain, load_documents, mix, pack, split_domains
from peft_bts.recipes.evaluation import evaluation_files
from peft_bts.recipes.recipe import read_recipe
from tests.helpers.text import word_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path):
    """Three files of 300 documents each, `a0` to `a299` and so on."""
    for name in ("a", "b", "c"):
        Dataset.from_list([{"text": f"{name}{i}"} for i in range(300)]).to_json(tmp_path / f"{name}.jsonl")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "c")}


def test_a_domain_in_a_word():
    for text, domain in (
        ("src/*.py:15", Domain("src/*.py", 15)),
        ("org/web/en", Domain("org/web/en")),
        ("C:/m.jsonl:0.5", Domain("C:/m.jsonl", 0.5)),
        ("a:b", Domain("a:b")),
        ('{"source": "a:1", "weight": 2}', Domain("a:1", 2)),
    ):
        assert as_domain("name", text) == domain


def test_sources(tmp_path, monkeypatch):
    """Files of every kind, patterns and folders are read here; anything else is asked for on the Hub."""
    rows = [{"text": f"document {i}\n\nof two paragraphs"} for i in range(4)]
    texts = [row["text"] for row in rows]
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for source in ("rows.jsonl", "rows.parquet", "folder", "folder/deep/*.txt", "folder/**/*.txt"):
        assert load_documents(str(tmp_path / source))["text"] == texts, source
    with pytest.raises(ValueError, match="several kinds"):
        load_documents(str(tmp_path))
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}' holds no documents"):
            load_documents(str(tmp_path / name))
    (tmp_path / "broken.jsonl").write_text('{"text": "w3"}\n{"text"')
    with pytest.raises(ValueError, match=r"broken\.jsonl' cannot be read as json"):
        load_documents(str(tmp_path / "broken.jsonl"))

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: asked.append((*args, split)))
    for missing in (
        str(tmp_path / "nothing"),
        "nothing.jsonl",
        "../data/nothing",
        "data/nothing.json.gz",
        "data/nothing.txt",
        "./nothing",
        "*.nothing",
    ):
        with pytest.raises(FileNotFoundError, match=r"There is no file '.*nothing"):
            load_documents(missing)
    for source in ("wikitext", "org/corpus-v1.5", "org/corpus/a subset"):
        load_documents(source)
    assert asked == [
        ("wikitext", None, "train"),
        ("org/corpus-v1.5", None, "train"),
        ("org/corpus", "a subset", "train"),
    ]


def test_packing():
    """All tokens are there, in order, with an end between documents; only an incomplete last row is missing."""
    tokenizer = word_tokenizer()
    documents = Dataset.from_list([{"body": "w3 w4 w5"}, {"body": "w6"}, {"body": "w7 w8 <end>"}, {"body": "w9"}])
    rows = pack(documents, tokenizer, 4, "body")
    assert rows["input_ids"] == rows["labels"] == [[3, 4, 5, 2], [6, 2, 7, 8]]
    opened = Dataset.from_list([{"text": "<end> w3 w4"}, {"text": "<end> w5"}, {"text": "<end> w6 w7 w8"}])
    assert pack(opened, tokenizer, 4)["input_ids"] == [[2, 3, 4, 2], [5, 2, 6, 7]]  # as tokenizers do whose bos it is
    with pytest.raises(ValueError, match="no column 'text'"):
        pack(documents, tokenizer, 4)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        pack(documents, tokenizer, 4, "body")


def test_mixture(files):
    """Domains come in their shares, what is held out is never trained on, and weight 0 is evaluated only."""
    domains = {"a": Domain(files["a"], 3), "b": Domain(files["b"]), "c": Domain(files["c"], 0)}
    training, held_out = split_domains(domains, {}, 20)
    assert list(training) == ["a", "b"] and list(held_out) == ["a", "b", "c"]
    mixed = mix(training, {name: domain.weight for name, domain in domains.items()})
    counts = {name: sum(text.startswith(name) for text in mixed["text"]) for name in domains}
    assert counts["a"] / counts["b"] == pytest.approx(3, rel=0.15) and counts["c"] == 0
    texts = set(mixed["text"])
    assert len(texts) == 2 * 280  # everything that is not held out
    assert {name: len(rows) for name, rows in held_out.items()} == {"a": 20, "b": 20, "c": 20}
    assert not texts & {text for rows in held_out.values() for text in rows["text"]}
    alone, same = split_domains({"a": domains["a"]}, {}, 20)
    assert alone["a"]["text"] == training["a"]["text"] and same["a"]["text"] == held_out["a"]["text"]
    with pytest.raises(ValueError, match="'a' has 300 document"):
        split_domains(domains, {}, 300)
    with pytest.raises(ValueError, match="nothing to train on"):
        mix({}, {})


def test_evaluation_data(files, tmp_path):
    """A domain with evaluation data of its own holds out nothing; commands read the same documents as files."""
    training, evaluated = split_domains({"a": Domain(files["a"]), "b": Domain(files["b"])}, {"a": files["c"]}, 20)
    assert len(training["a"]) == 300 and len(training["b"]) == 280
    assert evaluated["a"]["text"][0] == "c0" and len(evaluated["b"]) == 20
    flags = ["--datasets", f"a={files['a']}", f"b={files['b']}", "--evaluation", f"a={files['c']}", "--held_out", "20"]
    found = evaluation_files(read_recipe([*flags, "--output_dir", str(tmp_path / "out")]))
    assert found == {"a": files["c"], "b": str(tmp_path / "out" / "evaluation" / "b.jsonl")}
    assert load_documents(found["b"])["text"] == evaluated["b"]["text"]
    with pytest.raises(ValueError, match="no column 'body'"):
        evaluation_files(read_recipe([*flags, "--output_dir", str(tmp_path / "out"), "--text_column", "body"]))
    with pytest.raises(ValueError, match="no output_dir"):
        evaluation_files(read_recipe(flags))
