"""Copies of a run's checkpoints at an address: a bucket, or whatever else `fsspec` reaches.

A checkpoint is copied once it is whole on disk, beside the steps that follow. Its manifest (`checksums.json`) comes
last, so a copy without one is not whole and is never taken. What goes wrong on the way is logged, and ends no run: the
next checkpoint is tried again.
"""

from __future__ import annotations

import logging
import os
import posixpath
import queue
import shutil
import threading
from pathlib import Path
from typing import Any

from streamjax.checkpoints.manifests import MANIFEST

_log = logging.getLogger(__name__)
_FETCHED = "fetched"  # what is on its way, beside the checkpoints
_POLL_SECONDS = 0.2


class CheckpointCopies:
    """The copies of one run, numbered by step.

    Args:
      address: where they are, for instance "gs://bucket/runs/mine", "s3://bucket/runs/mine" or a folder.
      keep: how many of the newest stay.

    Raises:
      ValueError: nothing leads to the address: a wrong one, no such package, or no access.
    """

    def __init__(self, address: str, keep: int = 3):
        self.address, self._keep = address.rstrip("/"), keep
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(self.address)
            self._fs.makedirs(self._root, exist_ok=True)
            self.steps  # noqa: B018 - whether it can be read
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the address {self.address} cannot be used: {said}") from error
        self._waiting: queue.Queue[tuple[Path, int] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def steps(self) -> list[int]:
        """The steps of which a whole copy is there, oldest first."""
        self._fs.invalidate_cache()
        names = (posixpath.basename(place.rstrip("/")) for place in self._fs.ls(self._root, detail=False))
        found = sorted(int(name) for name in names if name.isdigit())
        return [step for step in found if self._fs.exists(self._step_path(step, MANIFEST))]

    def fetch(self, step: int, folder: Path) -> None:
        """Bring the copy of a step into the folder of the checkpoints, under its name once it is there as a whole.

        Raises:
          ValueError: it does not arrive.
        """
        partial = folder.with_name(f"{folder.name}_{_FETCHED}") / str(step)
        shutil.rmtree(partial.parent, ignore_errors=True)
        try:
            for place in self._fs.find(self._step_path(step)):
                file = partial / posixpath.relpath(place, self._step_path(step))
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(place, str(file))
            folder.mkdir(parents=True, exist_ok=True)
            os.rename(partial, folder / str(step))
        except Exception as error:
            raise ValueError(f"step {step} cannot be fetched from {self.address}: {error}") from error
        finally:
            shutil.rmtree(partial.parent, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        """A file beside the copies; None where it is not there."""
        place = posixpath.join(self._root, name)
        return self._fs.cat_file(place) if self._fs.exists(place) else None

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(posixpath.join(self._root, name), content)

    def send(self, folder: Path, step: int) -> None:
        """Copy the checkpoint of a step, as soon as it has its name in `folder`, beside all else."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint copies", daemon=True)
            self._thread.start()
        self._waiting.put((folder, step))

    def set_aside_after(self, step: int) -> None:
        """Move copies of later steps beside the address, as a run that goes on from `step` will make them anew."""
        for later in [other for other in self.steps if other > step]:
            place = posixpath.join(f"{self._root}_set_aside", str(later))
            while self._fs.exists(place):
                place += "_"
            self._fs.makedirs(posixpath.dirname(place), exist_ok=True)
            for file in self._fs.find(self._step_path(later)):
                target = posixpath.join(place, posixpath.relpath(file, self._step_path(later)))
                self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
                self._fs.copy(file, target)
            self._remove(later)

    def close(self) -> None:
        """Wait for what is on its way; every checkpoint must have its name, or never get it."""
        self._closing.set()
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            folder, step = asked
            while not (folder / str(step)).is_dir() and not self._closing.wait(_POLL_SECONDS):
                pass
            if not (folder / str(step)).is_dir():
                continue  # it was never finished
            try:
                if step in self.steps:
                    continue
                self._copy(folder / str(step), step)
                for old in self.steps[: -self._keep]:
                    self._remove(old)
            except Exception as error:
                _log.warning("step %d was not copied to %s: %s", step, self.address, error)

    def _copy(self, source: Path, step: int) -> None:
        if self._fs.exists(self._step_path(step)):
            self._remove(step)
        files = [file for file in sorted(source.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file == source / MANIFEST):
            target = self._step_path(step, file.relative_to(source).as_posix())
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
            self._fs.put_file(str(file), target)

    def _remove(self, step: int) -> None:
        """The manifest first: what is left, if this ends half way, is not whole."""
        if self._fs.exists(self._step_path(step, MANIFEST)):
            self._fs.rm_file(self._step_path(step, MANIFEST))
        self._fs.rm(self._step_path(step), recursive=True)

    def _step_path(self, step: int, *names: Any) -> str:
        return posixpath.join(self._root, str(step), *names)
