"""`release_freed_memory`: what a process has freed, and its C library still holds, goes back to the system."""

from __future__ import annotations

import ctypes


def release_freed_memory() -> None:
    """Give back what compiling has left behind.

    XLA's compiler makes and frees many small things, between which glibc keeps the room. An engine for SmolLM2-135M
    holds 600 MiB of it behind its warm-up. Elsewhere than on glibc nothing happens.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or a system on which None names nothing
        return
    trim(0)
