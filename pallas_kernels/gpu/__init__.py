"""Kernels for NVIDIA GPUs: Triton (Ampere and later), and Mosaic GPU for Hopper."""
