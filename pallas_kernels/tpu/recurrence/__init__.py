"""Kernels of recurrences over matrix states on TPUs; `pallas_kernels.api` may import them."""
