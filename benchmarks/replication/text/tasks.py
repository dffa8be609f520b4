"""Questions about text that nobody made up: the next name in a program, a word of prose.

The generated tasks are in problems.py, translation is in catalogues.py.
"""

import keyword
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .documents import Document, Item


@dataclass(frozen=True)
class Task:
    """What is asked: of which domain it is, and how answers are rated."""

    domain: str
    metric: str  # "exact": right to the letter, in percent; "chrf": likeness of characters, 0 to 100
    title: str


TASKS = {
    "prose": Task("prose", "exact", "a word of prose that came before"),
    "python": Task("python", "exact", "the next name in Python, which came before"),
    "javascript": Task("javascript", "exact", "the next name in JavaScript, which came before"),
    "french": Task("french", "chrf", "English to French"),
    "german": Task("german", "chrf", "English to German"),
    "sums": Task("maths", "exact", "sums"),
    "stories": Task("maths", "exact", "word problems"),
}
CROSS = "french_stories"  # word problems in French, which need two experts
EXAMPLES = 4

_SHORTEST, _LONGEST = 60, 140  # characters of a question: with four examples, five of them fit 256 tokens
_JAVASCRIPT = {*re.findall(r"\w+", """
    break case catch class const continue debugger default delete else export extends false finally function import
    instanceof null return super switch this throw true typeof undefined void while with yield
""")}  # fmt: skip


def names(document: Document, rng: random.Random, most: int = 2) -> list[Item]:
    """Places of a program at which a name follows that is among the lines just before."""
    return _recalled(document, rng, r"[A-Za-z_][A-Za-z0-9_]{3,}", {*keyword.kwlist, *_JAVASCRIPT}, most)


def recalled_words(document: Document, rng: random.Random, most: int = 3) -> list[Item]:
    """Places of prose at which a word follows that was there just before."""
    return _recalled(document, rng, r"[a-z]{5,}(?![\w`])", set(), most)


def _recalled(document: Document, rng: random.Random, pattern: str, boring: set[str], most: int) -> list[Item]:
    """Items whose answer is a word that the prompt holds, with the space before it, if there is one.

    The prompt is the text right before, from the start of a line on, or of a word in prose without short lines.
    """
    text, items = document.text, []
    found = [match for match in re.finditer(rf"(?<![\w]){pattern}", text) if match[0] not in boring]
    rng.shuffle(found)
    for match in found:
        begin = match.start() - (match.start() > 0 and text[match.start() - 1] == " ")
        from_line = text.find("\n", max(0, begin - _LONGEST)) + 1
        prompt = text[from_line if 0 < from_line < begin else 0 : begin]
        # " name" and "name" are different tokens; four spaces and a name are three spaces and " name"
        if _SHORTEST <= len(prompt) <= _LONGEST and re.search(rf"\b{re.escape(match[0])}\b", prompt):
            items.append(Item(prompt, text[begin : match.end()], ends=False))
            if len(items) == most:
                break
    return items


def take(things: Sequence, count: int) -> list:
    """`count` of them, evenly from first to last; all where there are fewer."""
    return [things[i * len(things) // count] for i in range(count)] if len(things) > count else list(things)
