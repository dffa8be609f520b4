"""What stitching costs, as a small library. `benchmarks/speed.py` runs it.

presets.py  how large everything is
runners.py  what is timed: a forward, a training step, greedy decoding
plain.py    the paper's appendix B as a plain loop, to compare with
rows.py     every timed row: which runners take turns, and which ratios are asked
lora.py     the same for experts that are LoRAs of the hub
fresh.py    rows that need a fresh process: peak memory, attaching, loading
page.py     the results file as Markdown, with the targets
figures.py  its plots
"""
