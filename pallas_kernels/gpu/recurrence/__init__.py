"""Kernels of recurrences over matrix states on GPUs, in Triton; `pallas_kernels.api` may import them."""
