"""The study on real text that `benchmarks/replicate.py` runs; README.md says what there is and why.

A package imports from those above it, never from below.

text/        real text: pinned sources, splits, tasks, corpora
tokens/      tokenizer, training blocks, sequences to be scored
measures/    losses, answers, oracles, intervals
branching/   seeds and experts, and the loop that trains everything
methods/     every way to combine them, by name
work/        pieces of work, from presets to the plan of all of them
reporting/   from pieces to a results file, verdicts and a page
"""
