"""What a stitched model does at inference: `generate()`, and cheaper ways to run its experts."""
