"""Blockwise attention placeholder import target."""
def flash_attention(*a, **k):
    raise NotImplementedError
