"""Checkpoints of others, read lazily into the layout of ours: one module per format."""
