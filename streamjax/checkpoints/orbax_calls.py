"""Calls of Orbax whose errors are one line: its threads log a traceback each, and what it raises is of many kinds."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
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
            _forget_frames(error)
        if failure is not None:
            gc.collect()  # tasks that nobody waits for any more report their errors here
    if failure is not None:
        _ignore_late_tasks()
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
            _forget_frames(error)
        if reason is not None:
            gc.collect()
    if reason is not None:
        _ignore_late_tasks()
        raise DamagedFile(f"{path} is damaged, its arrays cannot be read ({reason}); restore it from a copy")


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold: Orbax's tasks, which report their own errors when they go."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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


class _Quiet:
    """A hook for errors that nobody can be told, without those of Orbax's tasks whose loop was closed."""

    def __init__(self, hook: Callable[[sys.UnraisableHookArgs], object]):
        self._hook = hook

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        task = unraisable.object
        ours = inspect.iscoroutine(task) and "orbax" in task.cr_code.co_filename
        if not ours and "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)


def _ignore_late_tasks() -> None:
    """After a failure for good: TensorStore's threads end what was begun whenever they come to it."""
    if not isinstance(sys.unraisablehook, _Quiet):
        sys.unraisablehook = _Quiet(sys.unraisablehook)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep what Orbax's threads, and the event loops that they close, say of errors from the log."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    for logger in loggers:
        logger.addFilter(is_news)
    _ignore_late_tasks()
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(is_news)
