"""Faults that were found in use, the edits that bring them back, and the tests that must then fail."""
