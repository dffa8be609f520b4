"""What a stitched model takes, before any weight is loaded."""
