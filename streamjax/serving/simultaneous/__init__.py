"""Streams that answer while they are read, beside an engine: at most so many, computed step by step in turns."""
