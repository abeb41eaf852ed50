"""Calls of Orbax whose errors are one line: its threads log a traceback each, and what it raises is of many kinds."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from streamjax.checkpoints.manifests import DamagedFile, check_manifest
from streamjax.checkpoints.replacing import SaveError, not_saved

_HANDLES = 128  # files that Orbax opens at once, and some more


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around a save to `path`.

    Raises:
      SaveError: whatever went wrong, the full disk above all.
    """
    _require_handles(path)
    failure = None
    with _without_tracebacks():
        try:
            yield
        except SaveError:
            raise
        except Exception as error:  # TensorStore has a ValueError for a full disk, and other kinds for other faults
            failure = not_saved(path, error)
        if failure is not None:
            gc.collect()  # tasks that nobody waits for any more report their errors here
    if failure is not None:
        raise failure


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a checkpoint, whose files are checked before.

    Raises:
      DamagedFile: a file is not as it was saved, or cannot be read.
    """
    check_manifest(path)
    _require_handles(path)
    reason = None
    with _without_tracebacks():
        try:
            yield
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise whatever they happen to stumble over, KeyError included
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if reason is not None:
            gc.collect()
    if reason is not None:
        raise DamagedFile(f"{path} is damaged, its arrays cannot be read ({reason}); restore it from a copy")


def _require_handles(path: Path) -> None:
    """Raise SaveError where the process may not open the files that Orbax needs: it would wait for ever."""
    folder = Path("/proc/self/fd")
    opened = len(os.listdir(folder)) if folder.is_dir() else 0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit - opened < _HANDLES:
        raise SaveError(
            f"{path}: this process may open {limit} files and has opened {opened}, and {_HANDLES} more are needed: "
            "raise the limit, such as with ulimit -n 1024"
        )


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep what Orbax's threads, and the event loops that they close, say of errors from the log."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    def ignore_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    for logger in loggers:
        logger.addFilter(is_news)
    sys.unraisablehook = ignore_closed_loops
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(is_news)
