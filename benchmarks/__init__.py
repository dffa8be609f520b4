"""What the figures in the documentation come from. Run from the repository's root: `python -m benchmarks.speed`.

replicate.py  the paper's study on real text, at a small size; replication/ is its library
speed.py      what stitching costs, in ratios to the same models without; speed_parts/ is its library
options.py    what each option of `StitchConfig` does to quality, weights and time
gates.py      whom the quickstart's stitches listen to
dropping.py   what it costs in quality to leave experts out while decoding
memory.py     memory of a training step

reporting.py  for all of them: results files, tables, figures
measuring.py  for all of them: whatever is compared takes turns; what must not share memory gets a fresh process
"""
