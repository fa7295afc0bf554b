"""One module per file format: each yields (name, array) of a checkpoint, one tensor at a time."""
