"""A testbed that can tell methods apart."""
