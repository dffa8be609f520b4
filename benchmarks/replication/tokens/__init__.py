"""From text to tokens.

sequences.py   sequences to be scored: documents, and items behind their examples
"""
