"""One stitched model over several processes, each of which holds some of its models."""
