"""Sequences of mixed lengths on groups of devices of different sizes: which group reads which, and the gradient so."""
