"""A training run: its configuration, its loop, checkpoints and metrics."""
