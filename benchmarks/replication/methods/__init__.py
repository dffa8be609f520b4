"""Every way to combine the models.

registry.py      all methods by name, and what they are called in tables
builders.py      how each is built, and what of it is trained
ensembles.py     BTM and expert routing: several whole models side by side
token_router.py  a learned router that sends each token to one model
mixtures.py      BTX and BAM: one model with a mixture of experts inside
parameters.py    weights: counted, kept and loaded
streams.py       what a method predicts, token by token, for decoding
cost.py          what a method costs: time, memory and FLOPs, in ratios to the seed's
"""
