"""The models that are combined, and the loop that trains them and everything made of them.

training.py    the one training loop
models.py      seeds and experts: their sizes, what each is trained on, whether an expert has learned its domain
trained.py     those of one set, by name
"""
