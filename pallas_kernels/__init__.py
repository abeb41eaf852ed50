"""Attention and loss kernels on plain arrays, and their references. Imports nothing of streamjax."""
