"""Domains, their tasks, and what is made of them: blocks of tokens to train on, blocks and items to be tested on.

The domains are those of `peft_bts.toy`, made larger where a test of 1000 items needs it:

    text    docstrings of Python's standard library          (token accuracy)
    code    its sources without docstrings                   (token accuracy)
    math    "347+8=" -> "5530", the sum from its units on    (exact match)
    lang    English -> Esperanto by rule; number words       (exact match, sentences only)
    roman   "347 in Roman =" -> " CCCXLVII", for the expert that is added later

and the *cross* task, which needs two experts, the words from one and the sum from the other, in two formats:

    cross_direct  "tricent kvardek sep plus ok =" -> "5530"
    cross_steps   "tricent kvardek sep plus ok =" -> " 347+8=5530", the sum written in digits first
"""

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from peft_bts import toy
from peft_bts.toy import DOMAINS, TASKS

from .presets import Preset


CROSS = ["cross_direct", "cross_steps"]
SPLITS = ["validation", "test"]

Item = tuple[str, str]  # a document: a prompt, and the answer that models learn and are tested on


@dataclass
class Rows:
    """Token sequences to be scored: tokens and labels (N, T), -100 where nothing is scored, as in transformers.

    `prompt` (N,) is how many leading tokens are given: all that a method may look at that decides once per sequence.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Rows":
        return Rows(self.tokens[index], self.labels[index], self.prompt[index])


@dataclass
class Data:
    """All of one set: training blocks (N, 2, length) by domain, and rows to score by split and name."""

    tokenizer: PreTrainedTokenizerFast
    train: dict[str, torch.Tensor]
    rows: dict[str, dict[str, Rows]]
    items: dict[str, dict[str, list[Item]]]


# --- Tasks ----------------------------------------------------------------------------------------------------------


def sums() -> list[tuple[int, str, int, str]]:
    """Every 3-digit number plus or minus every digit, with the answer: zero-padded, units first."""
    return [
        (a, sign, b, f"{a + b if sign == '+' else a - b:04d}"[::-1])
        for a in range(100, 1000)
        for b in range(10)
        for sign in "+-"
    ]


_DIGIT_WORDS = ["nul", "unu", "du", "tri", "kvar", "kvin", "ses", "sep", "ok", "nau"]


def esperanto_number(n: int) -> str:
    """0 to 999 in words (ASCII: "nau" for nine): 347 is "tricent kvardek sep"."""
    hundreds, tens, units = n // 100, n // 10 % 10, n % 10
    words = [
        f"{'' if count == 1 else _DIGIT_WORDS[count]}{power}"
        for count, power in ((hundreds, "cent"), (tens, "dek"))
        if count
    ]
    if units or not n:
        words.append(_DIGIT_WORDS[units])
    return " ".join(words)


def roman_number(n: int) -> str:
    """1 to 3999 in Roman numerals."""
    out = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
    ):
        out += letters * (n // value)
        n %= value
    return out


def number_words() -> list[Item]:
    """Numbers to words and words to numbers."""
    pairs = [(str(n), esperanto_number(n)) for n in range(1000)]
    return [(f"{digits} =", f" {words}") for digits, words in pairs] + [
        (f"{words} =", f" {digits}") for digits, words in pairs
    ]


def cross_item(task: tuple[int, str, int, str], steps: bool) -> Item:
    a, sign, b, answer = task
    prompt = f"{esperanto_number(a)} {'plus' if sign == '+' else 'minus'} {esperanto_number(b)} ="
    return prompt, f" {a}{sign}{b}={answer}" if steps else answer


def make_items(preset: Preset, rng: random.Random) -> dict[str, dict[str, list[Item]]]:
    """items[split][domain] of all generated tasks; validation and test items are never trained on."""
    arithmetic = sums()
    rng.shuffle(arithmetic)
    crossed = sums()
    rng.shuffle(crossed)
    drawn = 20 * preset.items
    tasks = {
        "math": [(f"{a}{sign}{b}=", answer) for a, sign, b, answer in arithmetic],
        "lang": toy.translation_tasks(rng, drawn),
        "roman": [(f"{n} in Roman =", f" {roman_number(n)}") for n in rng.sample(range(1, 4000), 3999)],
        **{f"cross_{kind}": [cross_item(t, kind == "steps") for t in crossed] for kind in ("direct", "steps")},
    }
    held_out = {"validation": preset.validation_items, "test": preset.items}
    items = {split: {} for split in ("train", *held_out)}
    for domain, pairs in tasks.items():
        start = 0
        for split, count in held_out.items():
            items[split][domain] = pairs[start : start + count]
            start += count
        rest = pairs[start:]
        if domain in CROSS:
            rest = rest[: preset.cross_items]
        if domain == "lang":
            numbers = number_words()
            items["train"][domain] = [
                rng.choice(numbers) if rng.random() < 0.3 else rng.choice(rest) for _ in range(2 * drawn)
            ]
        else:  # with replacement: where tasks are few, their order should not repeat, or it would be learned
            items["train"][domain] = rng.choices(rest, k=2 * drawn)
    return items


# --- Tokens ---------------------------------------------------------------------------------------------------------


Part = tuple[list[int], bool]  # tokens, and whether they are scored


def part_rows(tokenizer, sequences: list[list[Part]]) -> Rows:
    """Sequences made of parts, padded on the right. What is before the last scored part counts as the prompt."""
    longest = max(sum(len(ids) for ids, _ in parts) for parts in sequences)
    tokens = torch.full((len(sequences), longest), tokenizer.pad_token_id)
    labels = torch.full((len(sequences), longest), -100)
    prompt = torch.zeros(len(sequences), dtype=torch.long)
    for row, parts in enumerate(sequences):
        place = 0
        for ids, scored in parts:
            end = place + len(ids)
            tokens[row, place:end] = torch.tensor(ids)
            if scored:
                labels[row, place:end] = torch.tensor(ids)
                prompt[row] = place
            place = end
    return Rows(tokens, labels, prompt)


def asked_and_said(tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, opened by END, and of its answer, ended by it."""
    prompt, answer = item
    end = [tokenizer.eos_token_id]
    return tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"] + end


def item_rows(tokenizer, items: list[Item]) -> Rows:
    """One row per item: the prompt, and the answer with its end, which are scored."""
    rows = (asked_and_said(tokenizer, item) for item in items)
    return part_rows(tokenizer, [[(asked, False), (said, True)] for asked, said in rows])


def score_prompts(blocks: dict[str, torch.Tensor], every: int = 1) -> dict[str, torch.Tensor]:
    """Score prompts too, in one of `every` blocks.

    Models must have learned what their domain's prompts look like, or BTM could not tell domains by them. But drawn
    numbers are noise: where every prompt is learned, sums take more than twice as long to learn.
    """
    blocks = {domain: part.clone() for domain, part in blocks.items()}
    for part in blocks.values():
        part[::every, 1] = part[::every, 0]
    return blocks


def block_rows(blocks: torch.Tensor) -> Rows:
    """Blocks have no prompt; a method that decides once per sequence sees the first quarter."""
    tokens, labels = blocks.unbind(1)
    return Rows(tokens, labels, torch.full((len(blocks),), blocks.shape[-1] // 4))


def switching_blocks(blocks: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """`count` blocks of which the second half is of another domain, all ordered pairs of domains alike."""
    pairs = [(first, second) for first in DOMAINS for second in DOMAINS if first != second]
    half = next(iter(blocks.values())).shape[-1] // 2
    rows = []
    for i in range(count):
        first, second = pairs[i % len(pairs)]
        one, two = blocks[first], blocks[second]
        rows.append(torch.cat([one[i % len(one), :, :half], two[(i + 7) % len(two), :, :half]], dim=-1))
    return torch.stack(rows)


def three_rows(tokenizer, code: torch.Tensor, items: dict[str, list[Item]]) -> tuple[Rows, Rows]:
    """A translation, a piece of code and a sum in one sequence: once with both answers scored, once with the code."""
    answers, pieces = [], []
    for i, (lang, math) in enumerate(zip(items["lang"], items["math"])):
        piece = code[i % len(code), 0, : code.shape[-1] // 4].tolist()
        (asked, said), (sum_asked, sum_said) = (asked_and_said(tokenizer, item) for item in (lang, math))
        answers.append([(asked, False), (said, True), (piece + sum_asked, False), (sum_said, True)])
        pieces.append([(asked + said, False), (piece, True), (sum_asked + sum_said, False)])
    return part_rows(tokenizer, answers), part_rows(tokenizer, pieces)


# --- All of it ------------------------------------------------------------------------------------------------------


def make_data(preset: Preset, number: int) -> Data:
    """The data of set `number`: other draws of items, other orders."""
    documents = toy.read_python(limit=100 if preset.items < 100 else None)
    if preset.installed_packages:
        more = toy.read_python(limit=preset.installed_packages, root=Path(sysconfig.get_paths()["purelib"]))
        for split, parts in documents.items():
            for domain in parts:
                parts[domain] += more[split][domain]
    items = make_items(preset, random.Random(number))
    train = {**documents["train"], **items["train"]}
    tokenizer = toy.train_tokenizer(train, vocabulary=preset.vocabulary)
    blocks = score_prompts(toy.make_blocks(tokenizer, train, "tokenize", length=preset.length), every=8)
    rows = {}
    for split in SPLITS:
        enough = preset.blocks if split == "test" else preset.validation_blocks
        held_out = toy.make_blocks(
            tokenizer, documents[split] | {task: items[split][task] for task in TASKS}, split, length=preset.length
        )
        held_out = score_prompts({domain: part[:: -(-len(part) // enough)] for domain, part in held_out.items()})
        rows[split] = {f"{domain}_blocks": block_rows(part) for domain, part in held_out.items()}
        rows[split] |= {task: item_rows(tokenizer, pairs) for task, pairs in items[split].items()}
        rows[split]["switching"] = block_rows(switching_blocks(held_out, 2 * enough))
        rows[split]["three"], rows[split]["three_code"] = three_rows(tokenizer, held_out["code"], items[split])
    return Data(tokenizer, blocks, rows, {split: items[split] for split in SPLITS})
