"""Attention of sequences that lie over the devices of the mesh axis `context`: by a ring, gathered keys, or a halo."""
