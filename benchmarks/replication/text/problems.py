"""Sums and word problems of five levels, in English and French, and sentences with numbers to be translated.

A fact, that 34+25 is 59, is of one split for ever: no model is trained on one that it is tested on, in whatever words.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from num2words import num2words

from .documents import GIVEN, Document, Item


Step = tuple[int, str, int]  # (34, "+", 25)
WIDTH = 4  # digits of every result


def result(step: Step) -> int:
    a, sign, b = step
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def equation(step: Step) -> str:
    """Written out: "034+025=9500", operands filled up with zeros, the result as four digits from its units on.

    So every digit stands at a fixed distance from those it depends on, and a carry is known when it is needed: small
    transformers learn sums sooner that way (arXiv 2307.03381).
    """
    a, sign, b = step
    return f"{a:03d}{sign}{b:03d}=" + f"{result(step):0{WIDTH}d}"[::-1]


def split_of(step: Step) -> str:
    """10% of facts are for tests, 5% for validation; a+b and b+a are one fact."""
    a, sign, b = step
    first, second = (a, b) if sign == "-" else sorted((a, b))
    place = int(hashlib.sha256(f"{first}{sign}{second}".encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "test", 2: "validation"}.get(place, "train")


# --- Levels ---------------------------------------------------------------------------------------------------------

# (sign, range of a, range of b) by level, easiest first, and how often a level is drawn: who has learned the first one
# only has 30% right, who has learned all but products, 80%.
LEVELS = {
    "1": [("+", (10, 999), (1, 9)), ("-", (10, 999), (1, 9))],
    "2": [("+", (10, 99), (10, 99)), ("-", (10, 99), (10, 99))],
    "3": [("+", (100, 999), (10, 99)), ("-", (100, 999), (10, 99))],
    "4": [("+", (100, 999), (100, 999)), ("-", (100, 999), (100, 999))],
    "5": [("*", (10, 199), (2, 9))],
}
SHARES = {"1": 0.3, "2": 0.25, "3": 0.15, "4": 0.1, "5": 0.2}


def draw_step(rng: random.Random, level: str, split: str) -> Step:
    """A fact of a level and split; no result is negative."""
    while True:
        sign, of_a, of_b = rng.choice(LEVELS[level])
        step = (rng.randint(*of_a), sign, rng.randint(*of_b))
        if result(step) >= 0 and split_of(step) == split:
            return step


def second_steps(first: Step, sign: str, split: str) -> list[Step]:
    """Easy facts of the same split that go on from a step's result; often there are none."""
    steps = [(result(first), sign, b) for b in range(1, 10)]
    return [step for step in steps if result(step) >= 0 and split_of(step) == split]


def draw_level(rng: random.Random) -> str:
    return rng.choices(list(SHARES), list(SHARES.values()))[0]


# --- Words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A problem in words for steps with these signs; `{a}`, `{b}`, `{c}` are its numbers."""

    signs: str
    english: str
    french: str


STORIES = [
    Story("+", "{name} has {a} {things}. {name} buys {b} more. How many {things} does {name} have now?",
          "{name} a {a} {things}. {name} en achète encore {b}. Combien de {things} a maintenant {name} ?"),
    Story("+", "There are {a} {things} in a box and {b} in a bag. How many {things} are there?",
          "Il y a {a} {things} dans une boîte et {b} dans un sac. Combien de {things} y a-t-il ?"),
    Story("-", "{name} has {a} {things} and gives {b} away. How many {things} are left?",
          "{name} a {a} {things} et en donne {b}. Combien de {things} reste-t-il ?"),
    Story("-", "There are {a} {things} in a shop. The shop sells {b}. How many {things} are left?",
          "Il y a {a} {things} dans un magasin. Le magasin en vend {b}. Combien de {things} reste-t-il ?"),
    Story("*", "There are {a} boxes with {b} {things} in each. How many {things} are there?",
          "Il y a {a} boîtes avec {b} {things} dans chacune. Combien de {things} y a-t-il ?"),
    Story("++", "{name} has {a} {things}, buys {b} and finds {c}. How many {things} does {name} have now?",
          "{name} a {a} {things}, en achète {b} et en trouve {c}. Combien de {things} a maintenant {name} ?"),
    Story("+-", "{name} has {a} {things}, buys {b} and then loses {c}. How many {things} are left?",
          "{name} a {a} {things}, en achète {b} puis en perd {c}. Combien de {things} reste-t-il ?"),
]  # fmt: skip
NAMES = ["Tom", "Lea", "Max", "Nina", "Paul", "Emma", "Hugo", "Zoe", "Lucas", "Clara"]
# In French none of them begins with a vowel, so that "de" stays "de".
THINGS = {"apples": ("pommes", "Äpfel"), "books": ("livres", "Bücher"), "cards": ("cartes", "Karten"),
          "stamps": ("timbres", "Briefmarken"), "pens": ("stylos", "Stifte"), "sweets": ("bonbons", "Bonbons"),
          "marbles": ("billes", "Murmeln"), "tickets": ("billets", "Eintrittskarten")}  # fmt: skip
# Nothing is asked here: these are to be translated, and bring a language's words for numbers.
SENTENCES = {
    "french": [("{name} has {a} {things}.", "{name} a {a} {things}."), ("{name} buys {a} {things}.",
               "{name} achète {a} {things}."), ("There are {a} {things} in a box.",
               "Il y a {a} {things} dans une boîte."), ("{name} loses {a} {things}.", "{name} perd {a} {things}.")],
    "german": [("{name} has {a} {things}.", "{name} hat {a} {things}."), ("{name} buys {a} {things}.",
               "{name} kauft {a} {things}."), ("There are {a} {things} in a box.",
               "Es sind {a} {things} in einer Kiste."), ("{name} loses {a} {things}.",
               "{name} verliert {a} {things}.")],
}  # fmt: skip


def in_words(number: int, language: str) -> str:
    return num2words(number, lang={"french": "fr", "german": "de"}[language])


def draw_sum(rng: random.Random, split: str) -> Item:
    level = draw_level(rng)
    asked, _, answer = equation(draw_step(rng, level, split)).partition("=")
    return Item(f"{asked}=", answer, level)


def draw_story(rng: random.Random, split: str, language: str = "english") -> Item:
    """A problem in words; the answer writes every step as an equation. In French its numbers are words too."""
    level = draw_level(rng)
    steps = [draw_step(rng, level, split)]
    story = rng.choice([story for story in STORIES if story.signs[0] == steps[0][1]])
    if len(story.signs) == 2:
        further = second_steps(steps[0], story.signs[1], split)
        if not further:
            return draw_story(rng, split, language)
        steps.append(rng.choice(further))
        level += ", two steps"
    numbers = [steps[0][0], *(step[2] for step in steps)]
    things = rng.choice(list(THINGS))
    if language == "french":
        numbers, things = [in_words(number, "french") for number in numbers], THINGS[things][0]
    text = getattr(story, language).format(name=rng.choice(NAMES), things=things, **dict(zip("abc", numbers)))
    ask = {"english": "\nAnswer:", "french": "\nRéponse :"}[language]
    return Item(text + ask, " " + ", ".join(map(equation, steps)), level)


def draw_sentence(rng: random.Random, language: str) -> Document:
    """A sentence with a number in digits, and the same in another language in words; in either order."""
    english, translation = rng.choice(SENTENCES[language])
    number, name, things = rng.randint(2, 999), rng.choice(NAMES), rng.choice(list(THINGS))
    theirs = THINGS[things][list(SENTENCES).index(language)]
    here = ("English", "english", english.format(name=name, a=number, things=things))
    there = (
        language.capitalize(),
        language,
        translation.format(name=name, a=in_words(number, language), things=theirs),
    )
    (label, kind, text), (other_label, other_kind, other) = rng.sample([here, there], 2)
    return Document(((kind, f"{label}: {text}\n{other_label}:"), (other_kind, f" {other}")), "generated")


def document(item: Item) -> Document:
    """An item as models learn it; what is asked is drawn, and given."""
    return Document(((GIVEN, item.prompt), ("maths", item.answer)), "generated")


def draw_many(count: int, draw: Callable, *arguments) -> list:
    """`count` different results of `draw(*arguments)`, in the order they came."""
    found: dict = {}
    while len(found) < count:
        found.setdefault(draw(*arguments), None)
    return list(found)
