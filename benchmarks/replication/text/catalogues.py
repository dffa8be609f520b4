"""Message catalogues: English messages of programs with their French and German translations."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polib

from .documents import Document, Item


LANGUAGES = {"french": "fr", "german": "de"}
_NAMES = {"french": "French", "german": "German"}
PLACEHOLDER = re.compile(r"%\(\w+\)\w|\{\w*\}|%\w")


@dataclass(frozen=True)
class Message:
    english: str
    language: str
    translation: str
    source: str


def catalogue_pattern(language: str) -> str:
    """Names of a language's catalogues in an archive; compiled ones count too."""
    code = LANGUAGES[language]
    return rf"(.*/)?(?:{code}|{code}_{code.upper()})/LC_MESSAGES/[^/]*\.(po|mo)$"


def read_catalogue(name: str, content: bytes) -> list[polib.POEntry]:
    """The finished entries of a .po or .mo file: no fuzzy or obsolete ones, no contexts, no plural forms."""
    if name.endswith(".po"):
        catalogue = polib.pofile(content.decode("utf-8"))
    else:  # polib opens compiled catalogues by path only
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "catalogue.mo"
            path.write_bytes(content)
            catalogue = polib.mofile(str(path))
    return [entry for entry in catalogue.translated_entries() if not (entry.msgctxt or entry.msgid_plural)]


def read_messages(files: Iterable[tuple[str, bytes]], language: str, source: str) -> list[Message]:
    """The usable messages of one package's catalogues. Where a message has a .po and a .mo file, the .po counts."""
    files = dict(files)
    found = {}
    for name, content in files.items():
        if name.endswith(".po") or f"{name[:-3]}.po" not in files:
            for entry in read_catalogue(name, content):
                english, translation = plain(entry.msgid), plain(entry.msgstr)
                if usable(english, translation):
                    found.setdefault(english, Message(english, language, translation, source))
    return list(found.values())


def plain(text: str) -> str:
    """In one spelling of spaces and apostrophes, and without the mark of a keyboard shortcut in front of a word."""
    text = re.sub(r"\s+", " ", text).strip().replace("\u2019", "'")  # \s: French puts narrow spaces before ":"
    return re.sub(r"(?<![\w%({])_(?=\w)", "", text)


def usable(english: str, translation: str) -> bool:
    """Whether both are short text in words: no markup, no identifiers, no shortcut within a word, and translated."""
    letters = sum(map(str.isalpha, english))
    return (
        english.isascii()
        and english != translation
        and 4 <= len(english) <= 160
        and len(translation) <= 200
        and letters > 0.6 * len(english)
        and not re.search(r"[<>_]|https?:", PLACEHOLDER.sub("", english + translation))
    )


def key(english: str) -> str:
    """What makes two messages one: the same words, whatever their case, signs and placeholders."""
    return " ".join(re.findall(r"[a-z]+", PLACEHOLDER.sub(" ", english.lower())))


def asked(english: str, language: str) -> str:
    return f"English: {english}\n{_NAMES[language]}:"


def document(message: Message) -> Document:
    """A translation, as models learn it."""
    parts = (("english", asked(message.english, message.language)), (message.language, f" {message.translation}"))
    return Document(parts, message.source)


def item(message: Message) -> Item:
    return Item(asked(message.english, message.language), f" {message.translation}")


def three_languages(messages: list[Message], most: int = 4, longest: int = 600) -> list[Document]:
    """Messages that have both translations, two to `most` of one package to a document: English, French, German."""
    by_message: dict[tuple[str, str], dict[str, Message]] = {}
    for message in messages:
        by_message.setdefault((message.source, message.english), {})[message.language] = message
    documents: list[Document] = []
    window: list[tuple[str, str]] = []
    source, step = "", 1 + len(LANGUAGES)

    def close() -> None:
        if len(window) >= 2 * step:
            documents.append(Document(tuple(window), source))
        window.clear()

    for (package, english), found in by_message.items():
        if len(found) < len(LANGUAGES):
            continue
        parts = [("english", f"English: {english}\n")]
        parts += [(name, f"{_NAMES[name]}: {found[name].translation}\n") for name in LANGUAGES]
        length = sum(len(text) for _, text in window + parts)
        if package != source or len(window) == most * step or length > longest:
            close()
        source = package
        window += parts
    close()
    return [one for one in documents if len(one.text) <= longest]
