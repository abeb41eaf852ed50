"""The checkpoints of a training run: numbered by step, the newest few kept, resumed exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from streamjax.checkpoints.manifests import DamagedFile, check_manifest
from streamjax.checkpoints.orbax_calls import reading, saving
from streamjax.checkpoints.pytrees import (
    ARRAYS,
    orbax_items,
    read_about,
    rebuild,
    restore_args,
    wait_for_others,
)
from streamjax.checkpoints.replacing import seal

Tree = TypeVar("Tree")


class RunCheckpoints:
    """The checkpoints of one training run, in a folder, numbered by step.

    Args:
      folder: where they are; made if it does not exist.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self._folder = Path(folder).absolute()
        self._unsealed: list[int] = []  # steps that have no manifest yet
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # before the step gets its name: a run that is killed leaves none without a manifest
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        with saving(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps that were saved, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, about: Mapping[str, Any]) -> None:
        """Save a pytree of arrays and a dictionary that JSON can hold under `step`; nothing if that step is there.

        Raises:
          SaveError: the disk is full, or does not let itself be written to; the earlier checkpoints are as they were.
        """
        if step in self._manager.all_steps():
            return
        with saving(self._folder / str(step)):
            self._manager.wait_until_finished()
            self._unsealed.append(step)
            self._manager.save(step, args=ocp.args.Composite(**orbax_items(tree, about)))
            if jax.default_backend() == "cpu":  # the next step would overwrite the very memory that is read
                self._manager.wait_until_finished()

    def restore(self, step: int, template: Tree) -> tuple[Tree, dict[str, Any]]:
        """The tree and the dictionary of `step`, in the structure and on the devices of `template`.

        Raises:
          ValueError: one line: there is no such step, or it was saved from another structure.
          DamagedFile: one that names what is damaged, and the newest step before it that is whole.
        """
        path = self._folder / str(step)
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; there is {there}")
        try:
            about = read_about(path)
            args = ocp.args.Composite(**{ARRAYS: restore_args(template, about, path, cast=False)})
            with reading(path):
                found = self._manager.restore(step, args=args)[ARRAYS]
        except DamagedFile as error:
            good = next((other for other in reversed(self.steps) if other < step and self._is_whole(other)), 0)
            way = f"go on from the step before it with --resume_from={good}" if good else "begin with --resume_from=0"
            raise DamagedFile(f"the checkpoint of step {step} is damaged: {error}; {way}") from error
        return rebuild(template, found), about

    def about(self, step: int) -> dict[str, Any]:
        """The dictionary of `step`; empty where it is not there or damaged, which `restore` then tells."""
        try:
            return read_about(self._folder / str(step))
        except ValueError:
            return {}

    def set_aside_after(self, step: int) -> None:
        """Move the checkpoints of later steps into a folder beside this one, so that the run can save them anew."""
        self._manager.wait_until_finished()
        later = [other for other in self.steps if other > step]
        if jax.process_index() == 0:
            for other in later:
                place = self._folder.with_name(f"{self._folder.name}_set_aside") / str(other)
                while place.exists():
                    place = place.with_name(f"{place.name}_")
                place.parent.mkdir(exist_ok=True)
                os.rename(self._folder / str(other), place)
        wait_for_others("set_aside_after")
        self._manager.reload()

    def close(self) -> None:
        """Wait for a save that is under way, and let go of the folder."""
        with saving(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()

    def _seal(self) -> None:
        """Give the checkpoint that was written its manifest; it has a passing name at that time."""
        while self._unsealed and jax.process_index() == 0:
            for place in self._folder.glob(f"{self._unsealed.pop()}.orbax-checkpoint-tmp*"):
                seal(place, unlisted="_CHECKPOINT_METADATA")  # which Orbax still writes to

    def _is_whole(self, step: int) -> bool:
        try:
            read_about(self._folder / str(step))
            check_manifest(self._folder / str(step))
        except ValueError:
            return False
        return True
