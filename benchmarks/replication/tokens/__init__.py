"""From text to tokens.

tokenizer.py   a byte-level BPE, trained on the corpora; stretches of text in its tokens
blocks.py      blocks to train on
sequences.py   sequences to be scored: documents, and items behind their examples
"""
