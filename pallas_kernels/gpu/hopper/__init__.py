"""Kernels for Hopper in Mosaic GPU: asynchronous products, and copies ahead of them."""
