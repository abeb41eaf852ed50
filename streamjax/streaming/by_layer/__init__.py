"""Streams that are read by a program a layer, which the host calls."""
