"""A whole composition as one checkpoint of its own: written by `write`, loaded by the classes in `model`."""
