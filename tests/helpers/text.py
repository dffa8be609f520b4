"""Tiny checkpoints with a tokenizer, and text, for tests that start where users start: with folders and files."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.zoo import tiny_model


VOCABULARY = 64  # the zoo's models'
CHAT = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


def word_tokenizer(**options):
    """w3 is 3, w4 is 4, and so on; the ids 0 to 2 are <pad>, <start> and <end>, as in the zoo's configs."""
    words = ["<pad>", "<start>", "<end>", *(f"w{i}" for i in range(3, VOCABULARY - 2)), "user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options |= {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    options |= {"model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    tokenizer.chat_template = CHAT
    return tokenizer


def save_model(folder, arch="llama", **options):
    """A checkpoint with its tokenizer; return the folder as a string."""
    tiny_model(arch, **options).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def document(domain, length, rng):
    """Words that can be learned: each is `domain` more than the one before, with a little noise."""
    word, words = rng.randrange(40), []
    for _ in range(length):
        word = (word + domain) % 40 if rng.random() < 0.9 else rng.randrange(40)
        words.append(f"w{3 + word}")
    return " ".join(words)


def write_documents(path, domain, count=60, length=40):
    """A jsonl file of documents of one domain (a number); return its path as a string."""
    rng = random.Random(domain)
    path.write_text("".join(json.dumps({"text": document(domain, length, rng)}) + "\n" for _ in range(count)))
    return str(path)


def token_rows(count=16, length=12, seed=1):
    """Rows of tokens, as a list of dicts of tensors."""
    rows = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]
