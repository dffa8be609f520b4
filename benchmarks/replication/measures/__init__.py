"""What is measured on sequences of tokens, of anything that predicts them.

losses.py      every token's loss under a model; bits per byte, answers that are right to the letter
oracles.py     the best that choices by document or token could do, from kept losses
gates.py       whom a stitched model listens to, by domain, and around changes of domain
answers.py     answers that are written greedily, and chrF
bootstrap.py   intervals over sets and items
"""
