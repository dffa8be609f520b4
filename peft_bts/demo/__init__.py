"""A stitched model in the browser: tokens as it writes them, in the colours of the models that it listens to."""

from .app import make_demo


__all__ = ["make_demo"]
