"""Gates of a stitched model: recorded, and shown as tables, figures, a page, and in Trainer's logs."""
