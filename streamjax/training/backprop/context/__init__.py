"""Chunked backprop where devices along the mesh axis `context` share sequences."""
