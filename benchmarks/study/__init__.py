"""A testbed that can tell methods apart: real text, pinned and offline, and what is measured on it.

sources.py     releases on the package index, pinned by hash, from which all text comes
documents.py   what everything is made of: documents, items, passages
pages.py       documentation: prose alone, and pages that go from prose to code and back
programs.py    Python, JavaScript, docstrings with sums
catalogues.py  messages in English, French and German
problems.py    sums and word problems of graded difficulty, in English and French
splits.py      splits by name, near duplicates and verbatim stretches across them
tasks.py       all tasks; questions about found text
corpora.py     what the corpora are
building.py    from archives to corpora
loading.py     the corpora, built once: `load_corpora(cache)`
tokens.py      tokenizer, training blocks, sequences to be scored
models.py      seeds and experts
losses.py      every token's loss under every model, kept on disk; bits per byte
oracles.py     BTM, and the best that choices by document or token could do, from kept losses
answers.py     answers that models write, and chrF
bootstrap.py   intervals over sets and items

presets.py     how large everything is, and in which order the parts are run: quick, full, gpu, smoke
material.py    training blocks and tests of a preset, in tokens
routers.py     a learned router that sends each token to one model
methods.py     every compared method by name
sets.py        pieces of work: a seed and its experts
combining.py   pieces of work: the models of a set combined by every method, trained and tested
plan.py        all pieces of a preset, in their order
run.py         the command
hours.py       core hours by part: spent, and left
tables.py      the pieces' results as arrays over sets and documents
verdicts.py    paired differences, the paper's claims, our targets
summary.py     one results file
report.py      the results file as Markdown
plots.py       the report's plots
quote.py       the results' figures in other pages

`python -m benchmarks.study` downloads and builds the corpora, and prints the tables of README.md.
`python -m benchmarks.study.run` trains, tests and reports.
"""
