"""The paper's study at a size that fits, as a small library. `benchmarks/replicate.py` runs it.

presets.py     how large everything is: quick, full, gpu, smoke
data.py        domains, tasks, sequences that switch domain: tokens for training, validation and test
training.py    the one training loop
mixtures.py    BTX and BAM: models with a mixture of experts inside
ensembles.py   soup, BTM, expert routing: several whole models, nothing (or one small router) trained
methods.py     every compared method by name: how it is built, and what of it is trained
evaluation.py  losses, accuracies and exact matches of anything that predicts tokens
cost.py        parameters, time, memory and FLOPs of a training step
jobs.py        work in pieces: each writes one result file, and is skipped where that file exists
studies.py     which pieces there are: the main table, cross capability, removal, addition, gates
summary.py     from the pieces of all sets to one results file
claims.py      the paper's claims, and the verdict on each
report.py      the results file as Markdown
figures.py     the report's plots
"""
