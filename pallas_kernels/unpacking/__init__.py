"""Codes whose codec says itself how the decoding kernels unpack them: `Unpacking`, and a file for each way to."""
