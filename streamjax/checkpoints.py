"""Saving and restoring with Orbax: models, streams, and training runs that resume exactly.

Arrays are stored under the names of their places in the tree, so that a checkpoint does not depend on the classes that
held them; what is static (a `ModelConfig`, a cache specification) is not stored in them but beside them as JSON, or
comes from the template that is restored into. A save is atomic: it appears whole, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places, such as "model.layers.0.mlp.up"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", ""): leaf for path, leaf in flat}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _rebuild(template: Tree, leaves: dict[str, Any]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in named_leaves(template)])


class RunCheckpoints:
    """The checkpoints of one training run, in a folder, numbered by step.

    Args:
      folder: where they are; made if it does not exist.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=jax.default_backend() != "cpu"
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Save a pytree of arrays and a JSON-able dictionary under `step`; does nothing if it is there."""
        if step in self._manager.all_steps():
            return
        items = {"state": ocp.args.PyTreeSave(named_leaves(state)), "about": ocp.args.JsonSave(about)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, template: Tree) -> tuple[Tree, dict[str, Any]]:
        """The state and the dictionary of `step`; `template` gives structure, dtypes and placement."""
        targets = {name: _target(leaf) for name, leaf in named_leaves(template).items()}
        restore = ocp.args.PyTreeRestore(
            targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
        )
        found = self._manager.restore(step, args=ocp.args.Composite(state=restore, about=ocp.args.JsonRestore()))
        return _rebuild(template, found["state"]), found["about"]

    def close(self) -> None:
        """Wait for saves that are under way, and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
