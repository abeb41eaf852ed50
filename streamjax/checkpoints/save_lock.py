"""One save at a time: processes that save to the same path wait for each other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_SECONDS = 120.0  # to wait for another process
_PAUSE = 0.05


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes of this machine, and other threads, out of the block.

    The file is made for the lock and is removed behind the block. The kernel lets go of it when a process dies, so a
    file that was left is no hindrance. Where the file system has no locks nobody waits.

    Raises:
      TimeoutError: another process does not let go of it.
      OSError: the file cannot be made.
    """
    handle = _take(file)
    try:
        yield
    finally:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
        finally:
            os.close(handle)


def _take(file: Path) -> int:
    end = time.monotonic() + _SECONDS
    while True:
        handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        if _lock(handle):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(file)):
                    return handle  # else it was removed meanwhile, by whoever had the lock
        os.close(handle)
        if time.monotonic() > end:
            raise TimeoutError(None, f"another process has been saving there for {_SECONDS:.0f} seconds")
        time.sleep(_PAUSE)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
