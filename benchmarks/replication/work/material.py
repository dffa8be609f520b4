"""What a study's models are trained on and tested on, in tokens, by name.

Tests are called "text/python", "mixed/pages", "alone/sums" (a question without examples) and "four/sums" (behind four
solved ones).
"""

from functools import cached_property
from pathlib import Path

import torch

from ..text.building import switches
from ..text.corpora import MIXED
from ..text.loading import load_corpora
from ..text.problems import document
from ..text.tasks import CROSS, TASKS, take
from ..tokens.blocks import make_blocks, training_blocks
from ..tokens.sequences import Sequences, document_sequences, item_sequences
from ..tokens.tokenizer import load_tokenizer
from .presets import Preset


SWITCHES = "switches"
PROTOCOLS = ("alone", "four")  # how questions are asked
Tests = dict[str, Sequences]


class Material:
    """The corpora of a preset, cut to its sizes; everything is made when it is first asked for."""

    def __init__(self, cache: Path, preset: Preset) -> None:
        self.cache, self.preset = cache, preset

    @cached_property
    def corpora(self):
        return load_corpora(self.cache, self.preset.corpora)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.cache, self.corpora, self.preset.vocabulary)

    def blocks(self, order: int) -> dict[str, torch.Tensor]:
        """Blocks (N, 2, T) of int16 by domain, of the cross task ("french_stories", "french_stories/200" and so on),
        and of documents that switch domain ("switches"); `order` decides the order of documents."""
        train = self.corpora.documents["train"]
        blocks = training_blocks(self.tokenizer, self.corpora, order)
        some = {domain: take(documents, self.preset.steps * self.preset.batch) for domain, documents in train.items()}
        made = switches(some, 2 * self.preset.steps * self.preset.batch)
        blocks[SWITCHES] = make_blocks(self.tokenizer, made, SWITCHES, order)
        items = [document(item) for item in self.corpora.items["train"][CROSS]]
        for count in {len(items), min(200, len(items))}:
            blocks[cross_blocks(count)] = make_blocks(self.tokenizer, items[:count], CROSS, order)
        return {name: part.short() for name, part in blocks.items()}

    def _documents(self, split: str, count: int | None) -> Tests:
        found = {}
        for domain, documents in self.corpora.documents[split].items():
            # Short documents are more than others.
            ratio = self.preset.corpora.held_out(split, domain) // self.preset.corpora.documents[split]
            part = documents if count is None else take(documents, ratio * count)
            found[f"text/{domain}"] = document_sequences(self.tokenizer, part)
        return found

    @cached_property
    def validation(self) -> Tests:
        """Text of each domain, and questions of the cross task, on which learning rates are chosen."""
        items = take(self.corpora.items["validation"][CROSS], 2 * self.preset.validation)
        tests = self._documents("validation", self.preset.validation)
        return tests | {f"alone/{CROSS}": item_sequences(self.tokenizer, items)}

    @cached_property
    def test(self) -> Tests:
        """Text, mixed text, and questions that have one right answer, asked alone."""
        count = self.preset.test
        tests = self._documents("test", count)
        for kind in MIXED:
            part = self.corpora.mixed[kind] if count is None else take(self.corpora.mixed[kind], count)
            tests[f"mixed/{kind}"] = document_sequences(self.tokenizer, part)
        asked = [task for task in TASKS if TASKS[task].metric == "exact"]
        return tests | {f"alone/{task}": self._questions(task) for task in (*asked, CROSS)}

    @cached_property
    def translations(self) -> Tests:
        """What is to be translated, with one translation of it, alone and behind four examples."""
        tasks = [task for task in TASKS if TASKS[task].metric == "chrf"]
        alone = {f"alone/{task}": self._questions(task) for task in tasks}
        return alone | {f"four/{task}": self.prompted[f"four/{task}"] for task in tasks}

    def _questions(self, task: str) -> Sequences:
        return item_sequences(self.tokenizer, take(self.corpora.items["test"][task], self.preset.asked))

    @cached_property
    def prompted(self) -> Tests:
        """All questions behind four solved examples."""
        return {
            f"four/{task}": item_sequences(
                self.tokenizer,
                take(self.corpora.items["test"][task], self.preset.prompted),
                self.corpora.items["examples"][task],
                length=self.preset.prompt_length,
            )
            for task in (*TASKS, CROSS)
        }


def cross_blocks(items: int) -> str:
    return f"{CROSS}/{items}"
