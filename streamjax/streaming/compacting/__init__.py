"""Streams laid out anew at a caller's word, and what budgets measure of a model for that."""
