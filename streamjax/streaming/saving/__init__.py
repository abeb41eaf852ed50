"""Saved streams: what a file holds of one, and of which model it is."""
