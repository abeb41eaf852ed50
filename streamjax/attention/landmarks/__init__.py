"""Hierarchical sparse attention: pages chosen by their landmarks, and attention inside them."""
