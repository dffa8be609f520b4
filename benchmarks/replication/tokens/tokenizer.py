"""The tokenizer: a byte-level BPE, trained on the corpora; stretches of text in its tokens."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ..text.corpora import Corpora
from ..text.documents import Document


END = "<|end|>"  # opens every document, which also ends the one before
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
