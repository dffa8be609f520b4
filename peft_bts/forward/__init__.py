"""One forward of a stitched model: hub and experts side by side, with stitches between them."""
