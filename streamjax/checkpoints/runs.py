"""The checkpoints of a training run: numbered by step, the newest few kept, resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from streamjax.checkpoints.pytrees import ARRAYS, orbax_items, read_about, rebuild, restore_args

Tree = TypeVar("Tree")


class RunCheckpoints:
    """The checkpoints of one training run, in a folder, numbered by step.

    Args:
      folder: where they are; made if it does not exist.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self._folder = Path(folder).absolute()
        # On a CPU a save would read the very memory that the next step overwrites, so it is not put off.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, about: Mapping[str, Any]) -> None:
        """Save a pytree of arrays and a dictionary that JSON can hold under `step`; nothing if that step is there."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.Composite(**orbax_items(tree, about)))

    def restore(self, step: int, template: Tree) -> tuple[Tree, dict[str, Any]]:
        """The tree and the dictionary of `step`, in the structure and on the devices of `template`."""
        path = self._folder / str(step)
        about = read_about(path)
        args = ocp.args.Composite(**{ARRAYS: restore_args(template, about, path, cast=False)})
        return rebuild(template, self._manager.restore(step, args=args)[ARRAYS]), about

    def close(self) -> None:
        """Wait for a save that is under way, and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
