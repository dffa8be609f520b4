"""From text to tokens: a BPE tokenizer, blocks to train on, and sequences to be scored."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..text.corpora import DOMAINS, Corpora
from ..text.documents import GIVEN, Document, Item
from ..text.tasks import EXAMPLES


END = "<|end|>"  # opens every document, which also ends the one before
LENGTH = 256  # tokens in a training block, and the most that a model is shown at once
VOCABULARY = 2048  # see README.md for why


def train_tokenizer(
    documents: dict[str, list[Document]], vocabulary: int = VOCABULARY, characters: int = 1_000_000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits as tokens, from `characters` of each domain's training text.

    All 256 bytes are tokens, so that any text has tokens and bits per byte are defined for all of it.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Sums are digits, and word problems a hundred words, which need no million characters.
    limits = {domain: characters if domain != "maths" else characters // 10 for domain in documents}
    tokenizer.train_from_iterator(
        [_some_text(documents[domain], limit) for domain, limit in limits.items()],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _some_text(documents: list[Document], characters: int) -> str:
    """Documents from all over the list."""
    order = random.Random(0).sample(documents, len(documents))
    texts, total = [], 0
    for document in order:
        if total > characters:
            break
        texts.append(document.text)
        total += len(document.text)
    return "\n".join(texts)


def load_tokenizer(cache: Path, corpora: Corpora, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """The tokenizer of these corpora, from `cache` where it is there."""
    folder = cache / f"tokenizer-{corpora.key}-{vocabulary}"
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        train_tokenizer(corpora.documents["train"], vocabulary).save_pretrained(unfinished)
        unfinished.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


# --- Encoding -------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, parts: Sequence[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    """Stretches of text, (kind, text), in tokens of their own: no token is of two kinds."""
    ids = tokenizer([text for _, text in parts], add_special_tokens=False)["input_ids"]
    return [(kind, tokens) for (kind, _), tokens in zip(parts, ids)]


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """How many bytes of text each token stands for, (vocabulary,); END stands for none.

    A byte-level token is written with one character for each byte.
    """
    count = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))], dtype=np.uint8)
    count[tokenizer.eos_token_id] = 0
    return count


def make_blocks(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], desc: str, seed: int, length: int = LENGTH
) -> torch.Tensor:
    """Documents in random order, one after another, cut into blocks: tokens and labels (N, 2, length).

    What is given has the label -100, which the loss leaves out, but in one document of eight: models must know what
    questions of their domain look like, or nothing could tell by a question whose it is; but drawn numbers are noise,
    and learning to predict them all makes sums take more than twice as long to learn.
    """
    tokens: list[int] = []
    labels: list[int] = []
    end = tokenizer.eos_token_id
    order = random.Random(seed).sample(documents, len(documents))
    for start in tqdm(
        range(0, len(order), 512), desc=f"tokenize {desc}", unit="document", unit_scale=512, leave=False
    ):
        batch = order[start : start + 512]
        encoded = iter(encode(tokenizer, [part for document in batch for part in document.parts]))
        for number, document in enumerate(batch):
            tokens.append(end)
            labels.append(end)
            for kind, ids in (next(encoded) for _ in document.parts):
                tokens += ids
                labels += ids if kind != GIVEN or number % 8 == 0 else [-100] * len(ids)
    whole = len(tokens) // length * length
    return torch.tensor([tokens[:whole], labels[:whole]]).view(2, -1, length).transpose(0, 1).contiguous()


def training_blocks(tokenizer: PreTrainedTokenizerFast, corpora: Corpora, seed: int) -> dict[str, torch.Tensor]:
    """Each domain's blocks; `seed` decides the order of the documents."""
    return {domain: make_blocks(tokenizer, corpora.documents["train"][domain], domain, seed) for domain in DOMAINS}


# --- Sequences to be scored -----------------------------------------------------------------------------------------


@dataclass
class Sequences:
    """Sequences of tokens, one after another in flat arrays; sequence i is at places starts[i] : starts[i + 1].

    tokens: (total,) int64. kinds: (total,) int16, indices into `names`; the kind -1 is not scored: the END that opens
    a sequence, and what is given. bytes: (total,) uint8. prompt: (N,) how many tokens a method may look at that
    decides once for a whole sequence.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    bytes: np.ndarray
    starts: np.ndarray
    prompt: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def scored(self) -> np.ndarray:
        return self.kinds >= 0

    def of(self, values: np.ndarray) -> list[np.ndarray]:
        """Values (..., total) in pieces, one for each sequence."""
        return np.split(values, self.starts[1:-1], axis=-1)

    def sums(self, values: np.ndarray, kind: str | None = None) -> np.ndarray:
        """Values (..., total) added up within each sequence, over scored tokens, or those of one kind: (..., N)."""
        chosen = self.scored if kind is None else self.kinds == self.names.index(kind)
        return np.add.reduceat(np.where(chosen, values, 0).astype(np.float64), self.starts[:-1], axis=-1)


def _sequences(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[list[tuple[str, list[int]]], int]]) -> Sequences:
    """From rows of (stretches of tokens by kind, length of the prompt)."""
    names = sorted({kind for parts, _ in rows for kind, _ in parts} - {GIVEN})
    number = {GIVEN: -1, **{name: place for place, name in enumerate(names)}}
    tokens = [token for parts, _ in rows for _, ids in parts for token in ids]
    kinds = [number[kind] for parts, _ in rows for kind, ids in parts for _ in ids]
    lengths = [sum(len(ids) for _, ids in parts) for parts, _ in rows]
    tokens = np.array(tokens, dtype=np.int64)
    return Sequences(
        tokens, np.array(kinds, dtype=np.int16), token_bytes(tokenizer)[tokens], np.cumsum([0, *lengths]),
        np.array([prompt for _, prompt in rows]), names,
    )  # fmt: skip


def document_sequences(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], length: int = LENGTH
) -> Sequences:
    """Documents, each opened by END and cut after `length` tokens.

    The prompt is what is given at the start; of a document where nothing is given, its first quarter.
    """
    rows = []
    for document in documents:
        parts = [(GIVEN, [tokenizer.eos_token_id]), *encode(tokenizer, document.parts)]
        total = min(length, sum(len(ids) for _, ids in parts))
        given = 1 + (len(parts[1][1]) if parts[1][0] == GIVEN else 0)
        rows.append((_cut(parts, length), given if given > 1 else max(1, total // 4)))
    return _sequences(tokenizer, rows)


def _cut(parts: list[tuple[str, list[int]]], length: int) -> list[tuple[str, list[int]]]:
    kept = []
    for kind, ids in parts:
        kept.append((kind, ids[:length]))
        length -= len(ids[:length])
    return [(kind, ids) for kind, ids in kept if ids]


def item_sequences(
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    examples: Sequence[Item] = (),
    seed: int = 0,
    length: int = LENGTH,
) -> Sequences:
    """Items; what is scored is the answer, with the END behind it where the text ends there.

    Args:
        examples: Items of which four are shown, solved, before each item. They are drawn for each item, but are the
            same for all methods; where no draw of 20 fits `length` tokens, they are the four shortest, or as many of
            these as do fit. Without any, items are asked alone.

    Raises:
        ValueError: If not even the shortest example fits.
    """
    rng, rows, end = random.Random(seed), [], [tokenizer.eos_token_id]

    def encoded(item: Item) -> tuple[list[int], list[int]]:
        (_, asked), (_, said) = encode(tokenizer, [("", item.prompt), ("", item.answer)])
        return end + asked, said

    solved = sorted(([*asked, *said] for asked, said in map(encoded, examples)), key=len)
    for item in items:
        asked, said = encoded(item)
        said = said + end if item.ends else said
        shortest = [solved[:count] for count in range(EXAMPLES, 0, -1)]
        draws = [*(rng.sample(solved, EXAMPLES) for _ in range(20)), *shortest] if solved else [[]]
        given = ([token for one in shown for token in one] + asked for shown in draws)
        fitting = next((tokens for tokens in given if len(tokens) + len(said) <= length), None)
        if fitting is None:
            raise ValueError(f"with an example, this item takes more than {length} tokens: {item}")
        rows.append(([(GIVEN, fitting), ("answer", said)], len(fitting)))
    return _sequences(tokenizer, rows)
