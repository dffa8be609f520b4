"""Experts of a stitched model: found, loaded, checked, attached."""
