"""Saving and restoring any pytree with Orbax.

Arrays are stored under the names of their places in the tree ("layers.0.mlp.up"), so that a checkpoint does not depend
on the classes that held them. What is static lies beside them as JSON. A save appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from streamjax.checkpoints.json_files import one_line, read_json
from streamjax.checkpoints.manifests import DamagedFile, check_manifest
from streamjax.checkpoints.orbax_calls import reading, saving
from streamjax.checkpoints.replacing import alone, begin, commit, discard, place_beside, whole

Tree = TypeVar("Tree")
ARRAYS, ABOUT = "arrays", "about"
_OWNED = frozenset((ARRAYS, ABOUT, "_CHECKPOINT_METADATA"))  # what Orbax writes into the folder


def save_pytree(tree: Any, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Save the arrays of a pytree, bit for bit, and a dictionary that JSON can hold. What was there is replaced.

    Files in the folder that no save has written stay.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
      SaveError: the disk is full, or does not let itself be written to; what was there before is as it was.
    """
    path = Path(path).resolve()
    check_place(path)
    items = ocp.args.Composite(**orbax_items(tree, about or {}))
    first = jax.process_index() == 0
    with saving(path), alone(path) if first else contextlib.nullcontext():
        fresh = begin(path) if first else place_beside(path)
        wait_for_others("save_pytree begins")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(fresh, args=items, force=True)
            if first:
                commit(path, fresh, _OWNED.__contains__)
        except BaseException:
            if first:
                discard(fresh)
            raise
        wait_for_others("save_pytree")


def wait_for_others(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_place(path: Path) -> None:
    """Make sure that a checkpoint may be written at a path: nothing is there, or an empty folder, or a checkpoint.

    Raises:
      ValueError: something else is there.
    """
    if path.exists() and not (path / ABOUT).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint: choose another path")


def restore_pytree(template: Tree, path: str | Path, *, cast: bool = False) -> Tree:
    """The arrays that `save_pytree` wrote, in the structure and on the devices of `template`.

    Args:
      template: a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings, shaped as what was saved.
      path: what was written.
      cast: convert to the template's dtypes; otherwise another dtype is an error.

    Raises:
      ValueError: one line that names the array that is missing, or has another shape or dtype.
      DamagedFile: one that names a file that is not as it was saved.
    """
    path = whole(Path(path).resolve())
    args = ocp.args.Composite(**{ARRAYS: restore_args(template, read_about(path), path, cast)})
    with reading(path), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(path, args=args)[ARRAYS]
    return rebuild(template, found)


def orbax_items(tree: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax items: the arrays that hold anything, and the dictionary with every array's shape and dtype."""
    leaves = named_arrays(tree)
    described = {name: [str(leaf.dtype), *leaf.shape] for name, leaf in leaves.items()}
    arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
    return {ARRAYS: ocp.args.PyTreeSave(arrays), ABOUT: ocp.args.JsonSave({**about, "arrays": described})}


def restore_args(template: Any, about: Mapping[str, Any], path: Path, cast: bool) -> Any:
    wanted, saved = named_arrays(template), about["arrays"]
    for name in [*wanted, *saved]:
        if name not in saved:
            raise ValueError(f"{path}: array {one_line(name)} is missing; it was saved from another model or version")
        if name not in wanted:
            raise ValueError(
                f"{path}: array {one_line(name)} has no place here; it was saved from another model or version"
            )
        dtype, *shape = saved[name]
        if tuple(shape) != wanted[name].shape or (dtype != str(wanted[name].dtype) and not cast):
            here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
            raise ValueError(f"{path}: array {one_line(name)} is {one_line(dtype)}{shape}, and {here} is expected")
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in wanted.items()
        if leaf.size
    }
    found = ocp.checkpoint_utils.construct_restore_args(targets)
    for name, leaf in wanted.items():
        if name in found and isinstance(leaf, jax.Array) and not leaf.committed:
            found[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.args.PyTreeRestore(targets, restore_args=found)


def rebuild(template: Tree, arrays: Mapping[str, Any]) -> Tree:
    """The tree of these arrays. What is not bound to a device in the template is not in the result either.

    `jit` takes an array that is bound to one for another kind of argument, and compiles a second program for it.
    """
    leaves = [
        jnp.asarray(arrays[name]) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in named_arrays(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def read_about(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The dictionary that was saved beside the arrays.

    Raises:
      ValueError: there is no checkpoint at `path`, or one of another `kind`.
      DamagedFile: the file is not as it was saved.
    """
    path = whole(path)
    file = path / ABOUT / "metadata"
    if not os.path.lexists(path / ABOUT):
        raise ValueError(f"no {kind or 'checkpoint'} at {path}")
    check_manifest(path, under=f"{ABOUT}/")
    try:
        about = read_json(file, finite=False)
    except ValueError as error:
        raise DamagedFile(f"{error}; restore it from a copy") from error
    if not _describes_arrays(about.get("arrays")):
        raise DamagedFile(f"{file} is damaged: it does not say which arrays there are; restore it from a copy")
    if kind is not None and about.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind}, but a {one_line(about.get('kind', 'pytree'))}")
    return about


def _describes_arrays(arrays: Any) -> bool:
    """Whether this is what `orbax_items` says of arrays: a dtype and a shape for each name."""
    return isinstance(arrays, dict) and all(
        isinstance(entry, list) and [type(part) for part in entry] == [str, *[int] * (len(entry) - 1)]
        for entry in arrays.values()
    )


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places, such as "layers.0.mlp.up"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in flat]
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))
