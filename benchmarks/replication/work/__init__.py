"""Work in pieces: each writes one result file, and is skipped where that file exists.

jobs.py        what a piece is; several processes share them
presets.py     how large everything is, and in which order the parts are run: quick, full, gpu, smoke
material.py    training blocks and tests of a preset, in tokens
measuring.py   a method on the tests, and what is kept of what comes out
sets.py        pieces: a seed and its experts
combining.py   pieces: the models of a set combined by every method, trained and tested
earlier.py     the results file that a run goes on from, and the learning rates in it
plan.py        all pieces of a preset, in their order
hours.py       core hours by part: spent, and left
"""
