"""From the archives of all sources to the corpora."""

import random
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from . import catalogues, pages, problems, programs, tasks
from .catalogues import LANGUAGES, Message
from .corpora import MIXED, Corpora, Sizes
from .documents import SPLITS, Document
from .sources import read_files
from .splits import found_in, keep_new, split_of


Found = dict[str, list[Document]]  # by split
Counts = dict[str, dict[str, int]]

# What of the sources is read: regular expressions that match names of files from their start.
PAGES = {"django": r"docs/.*\.txt$"}
PYTHON = {
    "django": r"django/(?!.*(locale|migrations)/).*\.py$",
    "wagtail": r"wagtail/(?!.*(locale|migrations)/).*\.py$",
}
JAVASCRIPT = {
    "django": r"django/contrib/admin/static/.*\.js$",
    "horizon": r".*\.js$",
    "django-cms": r"cms/(static/cms/js|tests)/.*\.js$",
    "nbclassic": r"nbclassic/static/((notebook|base|tree|auth|edit|services)/js|components/codemirror)/.*\.js$",
}
DOCSTRINGS = {"sympy": r"sympy/.*\.py$", "mpmath": r"mpmath/.*\.py$"}
CATALOGUES = ["django", "wagtail", "horizon", "django-cms", "django-oscar", "pretix", "spyder", "gramps", "mayan-edms",
              "weblate"]  # fmt: skip

# Percent of files or messages for tests and for validation: as many as 1,000 questions and 100 mixed pages take.
HELD_OUT = {"pages": (20, 6), "programs": (10, 5), "messages": (16, 5)}


def build(paths: dict[str, Path], sizes: Sizes) -> Corpora:
    """Everything, from archives by the name of their source. It takes some minutes."""
    counts: Counts = {}
    found = keep_new_documents(
        {
            "prose": read_prose(paths),
            "python": read_programs(paths, PYTHON, "python"),
            "javascript": read_programs(paths, JAVASCRIPT, "javascript"),
            "pages": {"test": read_pages(paths)},
            "docstrings": {"test": read_docstrings(paths)},
        },
        counts,
    )
    mixed = {kind: found.pop(kind)["test"] for kind in ("pages", "docstrings")}
    programs_and_pages = "\n".join(one.text for by_split in found.values() for one in by_split["train"])
    messages = read_messages(paths, programs_and_pages, counts)
    for language in LANGUAGES:
        found[language] = translations(messages, language, sizes)
    found["maths"] = {split: draw_problems(split, sizes) for split in SPLITS}

    items = make_items(found, messages, sizes)
    training = [one.text for by_split in found.values() for one in by_split["train"]]
    training += [item.text for item in items["train"][tasks.CROSS]]
    leave_out_known(items, "\n".join(training), counts)

    documents = {"train": {domain: by_split["train"] for domain, by_split in found.items()}}
    for split in SPLITS[1:]:
        documents[split] = {
            domain: tasks.take(by_split[split], sizes.held_out(split, domain)) for domain, by_split in found.items()
        }
    for split, count in sizes.items.items():
        items[split] = {task: tasks.take(part, count) for task, part in items[split].items()}
    mixed["catalogues"] = catalogues.three_languages(messages["test"])
    mixed["switches"] = switches(documents["test"], sizes.documents["test"])
    return Corpora(
        documents, items, {kind: tasks.take(mixed[kind], sizes.documents["test"]) for kind in MIXED}, counts
    )


# --- Documents of one domain ----------------------------------------------------------------------------------------


def read_text(paths: dict[str, Path], patterns: dict[str, str], desc: str) -> Iterator[tuple[str, str]]:
    """Files as (name with its source in front, text); one that is no UTF-8 is left out."""
    for source, pattern in patterns.items():
        for name, content in tqdm(read_files(paths[source], pattern), desc=f"read {desc}", unit="file", leave=False):
            try:
                yield f"{source}/{name}", content.decode("utf-8")
            except UnicodeDecodeError:
                continue


def read_prose(paths: dict[str, Path]) -> Found:
    found: Found = {split: [] for split in SPLITS}
    for name, page in read_text(paths, PAGES, "prose"):
        found[split_of(name, *HELD_OUT["pages"])] += pages.prose(page, name)
    return found


def read_programs(paths: dict[str, Path], patterns: dict[str, str], language: str) -> Found:
    found: Found = {split: [] for split in SPLITS}
    for name, text in read_text(paths, patterns, language):
        found[split_of(name, *HELD_OUT["programs"])] += programs.program(text, language, name)
    return found


def read_pages(paths: dict[str, Path]) -> list[Document]:
    """Windows of whole pages, of those files whose prose is for tests."""
    return [
        one
        for name, page in read_text(paths, PAGES, "pages")
        if split_of(name, *HELD_OUT["pages"]) == "test"
        for one in pages.mixed(page, name)
    ]


def read_docstrings(paths: dict[str, Path]) -> list[Document]:
    """Of packages that no training text is of."""
    return [
        one
        for name, text in read_text(paths, DOCSTRINGS, "docstrings")
        for one in programs.docstrings_with_sums(text, name)
    ]


def keep_new_documents(found: dict[str, Found], counts: Counts) -> dict[str, Found]:
    """Drop, of all kinds of text, what is too much like text of an earlier split, of whatever kind."""
    by_split = {split: [(kind, one) for kind in found for one in found[kind].get(split, [])] for split in SPLITS}
    kept = keep_new({split: [one.text for _, one in part] for split, part in by_split.items()}, "compare documents")
    new: dict[str, Found] = {kind: {split: [] for split in parts} for kind, parts in found.items()}
    for split, places in kept.items():
        for kind, one in (by_split[split][place] for place in places):
            new[kind][split].append(one)
    for kind, parts in new.items():
        counts[kind] = {split: {"found": len(found[kind][split]), "kept": len(part)} for split, part in parts.items()}
    return new


def draw_problems(split: str, sizes: Sizes) -> list[Document]:
    """Sums, and a word problem for every four of them.

    Those for training are drawn with replacement: of different ones there would soon be only hard ones left.
    """
    rng = random.Random(f"maths, {split}")
    count = sizes.problems if split == "train" else sizes.held_out(split, "maths")
    counts = {problems.draw_sum: count - count // 5, problems.draw_story: count // 5}
    items = []
    for draw, many in counts.items():
        if split == "train":
            items += [draw(rng, split) for _ in range(many)]
        else:
            items += problems.draw_many(many, draw, rng, split)
    rng.shuffle(items)
    return list(map(problems.document, items))


# --- Translations ---------------------------------------------------------------------------------------------------


def read_messages(paths: dict[str, Path], others: str, counts: Counts) -> dict[str, list[Message]]:
    """All messages by split; a message is in one split with all its translations, whatever package has it.

    Held-out messages are not near duplicates of others, and neither they nor their translations are a part of any
    message for training, or of `others`, the other training text: packages' sources hold their messages in English.
    """
    found: dict[str, list[Message]] = {split: [] for split in SPLITS}
    for language in LANGUAGES:
        for source in tqdm(CATALOGUES, desc=f"read {language}", unit="package", leave=False):
            files = read_files(paths[source], catalogues.catalogue_pattern(language))
            for message in catalogues.read_messages(files, language, source):
                # Messages of one or two words are not held out: any of them is a part of another one.
                long = len(message.english.split()) > 2
                name = catalogues.key(message.english)
                found[split_of(name, *HELD_OUT["messages"]) if long else "train"].append(message)
    english = {split: list(dict.fromkeys(message.english for message in part)) for split, part in found.items()}
    kept = keep_new(english, "compare messages", letters=True)
    new = {split: {english[split][place] for place in places} for split, places in kept.items()}

    training = [text for message in found["train"] for text in (message.english, message.translation)]
    held_out = [message for split in SPLITS[1:] for message in found[split]]
    known = found_in(
        (text for message in held_out for text in (message.english, message.translation)),
        "\n".join([others, *training]),
    )
    for split in SPLITS[1:]:
        new[split] -= {one.english for one in found[split] if one.english in known or one.translation in known}
    counts["messages"] = {split: {"found": len(english[split]), "kept": len(new[split])} for split in SPLITS}
    return {
        split: [message for message in part if split == "train" or message.english in new[split]]
        for split, part in found.items()
    }


def translations(messages: dict[str, list[Message]], language: str, sizes: Sizes) -> Found:
    """A language's documents; those for training with generated sentences among them, for its words for numbers."""
    rng = random.Random(language)
    found = {}
    for split, part in messages.items():
        different = dict.fromkeys(catalogues.document(one) for one in part if one.language == language)
        found[split] = list(different)
        if split == "train":
            share = sizes.sentences
            count = round(len(different) * share / (1 - share))
            found[split] += problems.draw_many(count, problems.draw_sentence, rng, language)
        rng.shuffle(found[split])
    return found


# --- Items ----------------------------------------------------------------------------------------------------------


def make_items(found: dict[str, Found], messages: dict[str, list[Message]], sizes: Sizes) -> dict[str, dict]:
    """items[split][task], more than are wanted: those that training text holds will be left out.

    Examples are of training text: prompts show them solved. The cross task has items to be trained on, too.
    """
    items = {}
    for split, count in sizes.items.items():
        of = "train" if split == "examples" else split
        rng = random.Random(f"items, {split}")
        made = {
            "prose": [item for one in found["prose"][of] for item in tasks.recalled_words(one, rng)],
            "python": [item for one in found["python"][of] for item in tasks.names(one, rng)],
            "javascript": [item for one in found["javascript"][of] for item in tasks.names(one, rng)],
            "sums": problems.draw_many(2 * count, problems.draw_sum, rng, of),
            "stories": problems.draw_many(2 * count, problems.draw_story, rng, of),
            tasks.CROSS: problems.draw_many(2 * count, problems.draw_story, rng, of, "french"),
        }
        for language in LANGUAGES:
            made[language] = [catalogues.item(one) for one in messages[of] if one.language == language and short(one)]
        items[split] = {task: list(dict.fromkeys(part)) for task, part in made.items()}
        for part in items[split].values():
            rng.shuffle(part)
    rng = random.Random("items, train")
    items["train"] = {tasks.CROSS: problems.draw_many(sizes.cross, problems.draw_story, rng, "train", "french")}
    return items


def short(message: Message) -> bool:
    """Whether five such translations fit a block of 256 tokens."""
    return len(message.english) <= 60 and len(message.translation) <= 80


def leave_out_known(items: dict[str, dict], training: str, counts: Counts) -> None:
    """Take out of the items for validation and tests what training text of any domain holds, to the letter."""
    held_out = (item.text for split in SPLITS[1:] for part in items[split].values() for item in part)
    known = found_in(held_out, training)
    for split in SPLITS[1:]:
        for task, part in items[split].items():
            items[split][task] = [item for item in part if item.text not in known]
            counts.setdefault(f"items, {task}", {})[split] = {"found": len(part), "kept": len(items[split][task])}


# --- Mixed documents ------------------------------------------------------------------------------------------------


def switches(documents: dict[str, list[Document]], count: int) -> list[Document]:
    """The first half of a document of one domain and the second half of another's; all ordered pairs alike."""
    pairs = [(first, second) for first in documents for second in documents if first != second]
    made = []
    for i in range(count):
        first, second = (documents[domain] for domain in pairs[i % len(pairs)])
        begin, end = first[i % len(first)], second[(7 * i + 3) % len(second)]
        made.append(Document((*half(begin, True), *half(end, False)), f"{begin.source} | {end.source}"))
    return made


def half(document: Document, first: bool) -> list[tuple[str, str]]:
    """Half of a document's text: up to its middle, or from there on, at a line's end where there is one near."""
    middle = document.text.find("\n", len(document.text) // 2) + 1 or len(document.text) // 2
    parts, place = [], 0
    for kind, text in document.parts:
        cut = min(max(middle - place, 0), len(text))
        kept = text[:cut] if first else text[cut:]
        if kept:
            parts.append((kind, kept))
        place += len(text)
    return parts
