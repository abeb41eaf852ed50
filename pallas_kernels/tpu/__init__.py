"""Kernels for TPUs, in Mosaic."""
