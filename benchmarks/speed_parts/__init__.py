"""What stitching costs, as a small library. `benchmarks/speed.py` runs it.

cases.py     sizes of models and presets; the models, with random weights
timing.py    runners take turns; medians of ratios; FLOPs; the bandwidth of memory
decoding.py  greedy decoding by hand, with dynamic caches, or static ones and compiled steps
plain.py     the paper's appendix B as a plain loop, to compare with
rows.py      every timed row: which runners take turns, and which ratios are asked
processes.py rows that need a fresh process: peak memory, attaching, loading
page.py      the results file as Markdown, with the targets
figures.py   its plots
"""
