"""A testbed that can tell methods apart: real text, pinned and offline, and what is measured on it.

sources.py     releases on the package index, pinned by hash, from which all text comes
documents.py   what everything is made of: documents, items, passages
pages.py       documentation: prose alone, and pages that go from prose to code and back
programs.py    Python, JavaScript, docstrings with sums
catalogues.py  messages in English, French and German
problems.py    sums and word problems of graded difficulty, in English and French
splits.py      splits by name, near duplicates and verbatim stretches across them
tasks.py       all tasks; questions about found text
building.py    from archives to corpora
corpora.py     the corpora: `load_corpora(cache)`
tokens.py      tokenizer, training blocks, sequences to be scored
models.py      seeds and experts
losses.py      every token's loss under every model, kept on disk; bits per byte
oracles.py     BTM, and the best that choices by document or token could do, from kept losses
answers.py     answers that models write, and chrF
bootstrap.py   intervals over sets and items

`python -m benchmarks.study` downloads and builds the corpora, and prints the tables of README.md.
"""
