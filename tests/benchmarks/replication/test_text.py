"""The study's text: nothing that is tested on is trained on, and all of it is what it is said to be."""

import itertools
import random
import re

import polib
import pytest

from benchmarks.replication.text import catalogues, pages, problems, programs, sources, splits, tasks
from benchmarks.replication.text.building import build, draw_problems
from benchmarks.replication.text.corpora import DOMAINS, MIXED, Corpora, Sizes
from benchmarks.replication.text.documents import Document, passages
from benchmarks.replication.text.loading import load_corpora
from benchmarks.replication.text.sources import SOURCES
from benchmarks.replication.tokens.tokenizer import train_tokenizer
from tests.helpers.study_archives import SIZES, write_archives


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("sources"), SOURCES)


@pytest.fixture(scope="module")
def corpora(paths):
    return build(paths, SIZES)


@pytest.fixture(scope="module")
def tokenizer(corpora):
    return train_tokenizer(corpora.documents["train"], vocabulary=400)


# --- The corpora as a whole -----------------------------------------------------------------------------------------


def check_nothing_known(corpora: Corpora):
    """No question with its answer, no message, no translation and no document for tests is in any training text."""
    training = "\n".join(
        [one.text for part in corpora.documents["train"].values() for one in part]
        + [item.text for part in corpora.items["train"].values() for item in part]
    )
    held_out = {one.text for kind in MIXED for one in corpora.mixed[kind]}
    for split in ("validation", "test"):
        held_out |= {item.text for part in corpora.items[split].values() for item in part}
        held_out |= {one.text for part in corpora.documents[split].values() for one in part}
        for language in catalogues.LANGUAGES:
            for (_, asked), (_, said) in (one.parts for one in corpora.documents[split][language]):
                held_out |= {asked.partition("\n")[0].removeprefix("English: "), said.strip()}
    assert not splits.found_in(held_out, training)


def check_no_verbatim_stretches(corpora: Corpora):
    stretches = splits.Stretches()
    for domain in ("prose", "python", "javascript"):
        for one in corpora.documents["train"][domain]:
            stretches.add(one.text)
    for domain in ("prose", "python", "javascript"):
        for split in ("validation", "test"):
            assert not any(stretches.shares(one.text) for one in corpora.documents[split][domain])
    for kind in ("pages", "docstrings"):
        assert not any(stretches.shares(one.text) for one in corpora.mixed[kind])


def test_nothing_tested_on_is_trained_on(corpora):
    check_nothing_known(corpora)
    check_no_verbatim_stretches(corpora)


def test_the_check_would_notice(corpora):
    """An item, and a document, smuggled into training text."""
    for smuggled in (corpora.items["test"]["sums"][0].text, corpora.documents["test"]["prose"][0].text):
        train = {**corpora.documents["train"], "prose": [Document((("prose", f"See {smuggled}, there."),))]}
        leaky = Corpora({**corpora.documents, "train": train}, corpora.items, corpora.mixed, {})
        with pytest.raises(AssertionError):
            check_nothing_known(leaky)


def test_every_domain_task_and_mixture_is_there(corpora):
    for split in ("train", "validation", "test"):
        assert [*corpora.documents[split]] == DOMAINS
        assert all(corpora.documents[split].values())
    for split, count in SIZES.items.items():
        assert corpora.items[split].keys() == {*tasks.TASKS, tasks.CROSS}
        assert all(len(part) == count for part in corpora.items[split].values())
    assert len(corpora.items["train"][tasks.CROSS]) == SIZES.cross
    assert all(corpora.mixed[kind] for kind in MIXED)
    assert all(len({kind for kind, _ in one.parts}) > 1 for part in corpora.mixed.values() for one in part)


def test_a_file_or_message_is_in_one_split_only(corpora):
    for domain in ("prose", "python", "javascript"):
        files = [{one.source for one in corpora.documents[split][domain]} for split in ("train", "validation", "test")]
        assert not any(one & other for one, other in itertools.combinations(files, 2))


def test_both_translations_of_a_message_are_in_one_split(corpora):
    def english(split):
        return {one.parts[0][1].partition("\n")[0] for language in catalogues.LANGUAGES
                for one in corpora.documents[split][language] if one.source != "generated"}  # fmt: skip

    assert not english("train") & english("test")
    assert not english("validation") & english("test")


def test_a_copied_file_is_left_out_and_counted(corpora):
    counts = corpora.counts["python"]["train"]
    assert counts["found"] > counts["kept"]


def test_building_again_gives_the_same(paths, corpora):
    assert build(paths, SIZES) == corpora


def test_corpora_are_kept_and_read_back(tmp_path, corpora, paths, monkeypatch):
    monkeypatch.setattr("benchmarks.replication.text.loading.download", lambda folder: paths)
    first = load_corpora(tmp_path, SIZES)
    monkeypatch.setattr("benchmarks.replication.text.loading.download", lambda folder: pytest.fail("built twice"))
    second = load_corpora(tmp_path, SIZES)
    assert first == second
    assert (second.documents, second.items, second.mixed) == (corpora.documents, corpora.items, corpora.mixed)


# --- Sources --------------------------------------------------------------------------------------------------------


def test_a_source_that_is_there_is_not_downloaded_again(tmp_path, monkeypatch):
    source = next(iter(sources.SOURCES.values()))
    path = tmp_path / source.file
    path.write_bytes(b"content")
    monkeypatch.setattr(sources, "SOURCES", {source.name: source})
    monkeypatch.setattr(sources, "digest", lambda path: source.sha256)
    monkeypatch.setattr(sources, "download_one", lambda *_: pytest.fail("downloaded"))
    assert sources.download(tmp_path) == {source.name: path}


def test_a_broken_file_is_downloaded_again(tmp_path, monkeypatch):
    source = next(iter(sources.SOURCES.values()))
    (tmp_path / source.file).write_bytes(b"half of it")
    monkeypatch.setattr(sources, "SOURCES", {source.name: source})
    asked = []
    monkeypatch.setattr(sources, "download_one", lambda source, path: asked.append(path))
    sources.download(tmp_path)
    assert asked == [tmp_path / source.file]


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    source = next(iter(sources.SOURCES.values()))
    done = sources.subprocess.CompletedProcess([], 1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit, match=r"(?s)pip did not bring django.*DO NOT MATCH THE HASHES.*start again"):
        sources.download_one(source, tmp_path / source.file)


@pytest.mark.slow
def test_the_real_corpora(tmp_path):
    """Downloads 149 MB; takes minutes. All sizes are as README.md says, and nothing of the tests is in training."""
    corpora = load_corpora(tmp_path)
    sizes = Sizes()
    for split in ("validation", "test"):
        assert all(len(part) == sizes.items[split] for part in corpora.items[split].values())
        for domain, part in corpora.documents[split].items():
            assert len(part) == sizes.held_out(split, domain)
    assert all(len(part) >= 100 for part in corpora.mixed.values())
    check_nothing_known(corpora)
    check_no_verbatim_stretches(corpora)


# --- Pages and programs ---------------------------------------------------------------------------------------------

PAGE = """\
Models
======

A model is the single source of information about data, and more besides.
It holds fields, for example::

    class Person(Model):

        name = CharField()

Fields are attributes of a class, and are described in a place of their own.

.. code-block:: console

    $ migrate

That is all there is to say of them for now, until the next release is out.
"""


def test_stretches_of_a_page_are_the_page():
    found = pages.stretches(PAGE)
    assert "".join(text for _, text in found) == PAGE
    assert [kind for kind, _ in found] == ["prose", "code", "prose", "code", "prose"]
    assert found[1][1].split() == ["class", "Person(Model):", "name", "=", "CharField()"]


def test_prose_has_no_code_and_no_markup():
    (document,) = pages.prose(PAGE, "a")
    assert "CharField" not in document.text
    assert "code-block" not in document.text
    assert "=====" not in document.text
    assert "for example:\n" in document.text


def test_mixed_pages_keep_the_order():
    (document,) = pages.mixed(PAGE, "a")
    assert document.text in PAGE
    assert [kind for kind, _ in document.parts] == ["prose", "code", "prose", "code", "prose"]


def test_passages_are_of_the_right_length_and_keep_lines():
    text = "\n\n".join("\n".join(["x" * 50] * 5) for _ in range(20))
    found = passages(text, longest=600, shortest=200)
    assert all(200 <= len(piece) <= 600 for piece in found)
    assert {line for piece in found for line in piece.split("\n")} == {"x" * 50, ""}
    assert sum(piece.count("x" * 50) for piece in found) == 100


def test_minified_programs_are_left_out():
    assert not programs.program("\n".join(["x" * 500] * 10), "javascript", "a")
    assert programs.program("\n".join(["let x = 1;"] * 30), "javascript", "a")


def test_docstrings_with_sums():
    source = 'def f():\n    """' + "Adds two numbers, as in the examples below. " * 3
    source += '\n\n    >>> 12 + 30\n    42\n    >>> f()\n    "a"\n    """\n'
    (document,) = programs.docstrings_with_sums(source, "a")
    assert [kind for kind, _ in document.parts] == ["prose", "python", "maths", "python", "prose"]
    assert document.parts[2][1] == "42\n"


# --- Catalogues -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_catalogues_read_finished_translations_only(tmp_path, compiled):
    made = polib.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    made.append(polib.POEntry(msgid="_Open the file", msgstr="Ouvrir le\u202ffichier"))
    made.append(polib.POEntry(msgid="Open a page", msgstr="Open a page"))
    made.append(polib.POEntry(msgid="<b>Bold</b> text", msgstr="Texte <b>gras</b>"))
    made.append(polib.POEntry(msgid="Close the file", msgstr="Fermer la page", flags=["fuzzy"]))
    made.append(polib.POEntry(msgid="Save the file", msgctxt="menu", msgstr="Enregistrer"))
    made.append(polib.POEntry(msgid="Print the file", msgstr=""))
    if compiled:
        made.remove(made[3])  # compilers leave fuzzy entries out, polib does not
        path = tmp_path / "a.mo"
        made.save_as_mofile(str(path))
        files = {"a/fr/LC_MESSAGES/a.mo": path.read_bytes()}
    else:
        files = {"a/fr/LC_MESSAGES/a.po": str(made).encode()}
    found = catalogues.read_messages(files.items(), "french", "a")
    assert found == [catalogues.Message("Open the file", "french", "Ouvrir le fichier", "a")]


def test_messages_in_three_languages():
    messages = [catalogues.Message(f"Message {i}", language, f"{language} {i}", "a")
                for language in catalogues.LANGUAGES for i in range(5)]  # fmt: skip
    (document,) = catalogues.three_languages(messages, most=4)
    assert document.text.startswith("English: Message 0\nFrench: french 0\nGerman: german 0\nEnglish: Message 1\n")
    assert [kind for kind, _ in document.parts] == ["english", "french", "german"] * 4


# --- Problems -------------------------------------------------------------------------------------------------------


def facts(text):
    """Every equation in a text."""
    found = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", text)
    assert all(len(answer) == problems.WIDTH for *_, answer in found)
    return [((int(a), sign, int(b)), int(answer[::-1])) for a, sign, b, answer in found]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("language", ["english", "french"])
def test_word_problems_are_right_and_of_their_split(split, language):
    rng = random.Random(0)
    for _ in range(100):
        item = problems.draw_story(rng, split, language)
        found = facts(item.answer)
        assert len(found) == (2 if "two steps" in item.level else 1)
        for step, answer in found:
            assert problems.result(step) == answer >= 0
            assert problems.split_of(step) == split
        assert any(map(str.isdigit, item.prompt)) == (language == "english")
        numbers = {str(number) for step, _ in found[:1] for number in (step[0], step[2])}
        assert language == "french" or all(number in item.prompt for number in numbers)


def test_sums_are_of_their_level():
    rng = random.Random(0)
    for level, kinds in problems.LEVELS.items():
        signs = {sign for sign, _, _ in kinds}
        assert {problems.draw_step(rng, level, "train")[1] for _ in range(50)} == signs
    assert sum(problems.SHARES.values()) == pytest.approx(1)


def test_training_sums_keep_the_levels_shares():
    """However few sums an easy level has."""
    documents = draw_problems("train", Sizes(problems=20_000))
    sums = [one.parts[0][1] for one in documents if one.parts[0][1].endswith("=")]
    assert len(sums) == 16_000
    easy = [asked for asked in sums if re.fullmatch(r"\d+[+-]00\d=", asked)]
    assert len(easy) / len(sums) == pytest.approx(problems.SHARES["1"], abs=0.02)


def test_order_does_not_matter_to_a_sum():
    assert all(problems.split_of((a, "+", b)) == problems.split_of((b, "+", a)) for a in range(50) for b in range(50))
    shares = [problems.split_of((a, "+", b)) for a in range(100) for b in range(a, 100)]
    assert shares.count("test") / len(shares) == pytest.approx(0.1, abs=0.01)


# --- Splits ---------------------------------------------------------------------------------------------------------


def test_near_duplicates_and_stretches_are_dropped():
    rng = random.Random(0)
    text = [f"word{rng.randrange(1000)}" for _ in range(100)]
    other = [f"thing{rng.randrange(1000)}" for _ in range(100)]
    near = text.copy()
    near[25::25] = ["new"] * len(near[25::25])  # no long stretch is left
    copied = other.copy()
    copied[10 : 10 + splits.STRETCH] = text[: splits.STRETCH]  # little of the whole
    texts = {"train": [" ".join(text)] * 2, "validation": [" ".join(near)], "test": map(" ".join, (other, copied))}
    kept = splits.keep_new({split: list(part) for split, part in texts.items()}, "test")
    assert kept == {"train": [0], "validation": [], "test": [0]}


def test_near_duplicate_messages():
    near = splits.NearDuplicates(letters=True)
    near.add("Delete the selected page")
    assert near.has_like("Delete the selected pages")
    assert not near.has_like("Create an account")


def test_found_in_agrees_with_in():
    rng = random.Random(0)
    text = "".join(rng.choices("ab", k=400))
    strings = {"".join(rng.choices("ab", k=rng.randint(3, 12))) for _ in range(200)}
    assert splits.found_in(strings, text) == {string for string in strings if string in text}


# --- Tasks ----------------------------------------------------------------------------------------------------------


def test_the_answer_is_in_the_prompt_and_its_tokens_are_those_of_the_whole(corpora, tokenizer):
    for split, domain in itertools.product(("validation", "test"), ("prose", "python", "javascript")):
        for item in corpora.items[split][domain]:
            assert item.answer.strip() in item.prompt
            asked, said, whole = tokenizer([item.prompt, item.answer, item.text], add_special_tokens=False)[
                "input_ids"
            ]
            assert asked + said == whole
            assert not item.ends


def test_items_continue_their_document():
    text = "def total(first, second):\n    subtotal = first * 2 + second\n    return subtotal + 1\n"
    document = Document((("python", text * 2),))
    items = tasks.names(document, random.Random(0), most=50)
    assert items
    assert all(item.text in document.text for item in items)
