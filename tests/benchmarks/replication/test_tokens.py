"""From the study's text to tokens: blocks, sequences, questions with examples, and bytes."""

import numpy as np
import pytest
import torch

from benchmarks.replication.text import tasks
from benchmarks.replication.text.documents import GIVEN, Document, Item
from benchmarks.replication.tokens.blocks import make_blocks
from benchmarks.replication.tokens.sequences import document_sequences, item_sequences
from benchmarks.replication.tokens.tokenizer import END


# --- Questions with examples ----------------------------------------------------------------------------------------


def test_examples_differ_between_items_and_not_between_methods(tokenizer, corpora):
    items, shown = corpora.items["test"]["sums"], corpora.items["examples"]["sums"]
    one, two = (item_sequences(tokenizer, items, shown) for _ in range(2))
    assert np.array_equal(one.tokens, two.tokens)
    texts = [tokenizer.decode(ids) for ids in one.of(one.tokens)]
    assert all(text.count(END) == tasks.EXAMPLES + 2 for text in texts)
    assert all(text.endswith(f"{item.text}{END}") for text, item in zip(texts, items))


def test_examples_that_fit_are_found_or_missed(tokenizer):
    items, long = [Item("1+1=", "2")], Item("1" * 60, "1")
    shown = [long] * 100 + [Item(f"{i}=", "3") for i in range(4)]
    tokens = item_sequences(tokenizer, items, shown, length=40).tokens
    assert tokenizer.decode(tokens).count("3") >= 4
    three = [long, *shown[-3:]]  # the four shortest are too long, three of them are not
    tokens = item_sequences(tokenizer, items, three, length=40).tokens
    assert tokenizer.decode(tokens).count(END) == 3 + 2
    with pytest.raises(ValueError, match=r"with an example, this item takes more than 40 tokens: .*1\+1="):
        item_sequences(tokenizer, items, [long] * 10, length=40)


# --- Tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 12", "Où est l'Œuvre ? 日本", "a  b", "\u202f\x00"])
def test_any_text_has_tokens_and_its_bytes_are_counted(tokenizer, text):
    sequences = document_sequences(tokenizer, [Document((("prose", text),))])
    assert tokenizer.decode(sequences.tokens[1:]) == text
    assert sequences.sums(sequences.bytes).sum() == len(text.encode())


def test_what_is_given_is_not_scored(tokenizer):
    document = Document(((GIVEN, "12+30="), ("maths", "42")))
    sequences = document_sequences(tokenizer, [document])
    assert tokenizer.decode(sequences.tokens[sequences.scored]) == "42"
    assert sequences.prompt.tolist() == [1 + len("12+30=")]
    blocks = make_blocks(tokenizer, [document] * 64, "test", seed=0, length=9)
    scored = (blocks[:, 1] != -100).sum(1)
    assert sorted(set(scored.tolist())) == [3, 9]
    assert (scored == 9).float().mean().item() == pytest.approx(1 / 8, abs=0.01)


def test_documents_are_cut_to_the_length(tokenizer):
    document = Document((("prose", "a1" * 100), ("python", "b2" * 100)))
    sequences = document_sequences(tokenizer, [document] * 2, length=250)
    assert np.diff(sequences.starts).tolist() == [250, 250]
    assert sequences.sums(sequences.bytes, "python").tolist() == [49, 49]


def test_blocks_hold_all_documents_in_an_order_that_depends_on_the_seed(tokenizer, corpora):
    documents = corpora.documents["train"]["python"]
    one, same, other = (make_blocks(tokenizer, documents, "test", seed=s, length=64) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert abs(one.numel() - other.numel()) <= 2 * 64
    assert documents[0].text[:40] in tokenizer.decode(one[:, 0].flatten())
