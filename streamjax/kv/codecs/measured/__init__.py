"""Codecs that were measured with a model, and the files that hold what was measured."""
