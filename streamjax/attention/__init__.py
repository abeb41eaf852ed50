"""Attention over whole sequences, the rotation of positions, and which implementation runs."""
