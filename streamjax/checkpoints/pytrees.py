"""Saving and restoring any pytree with Orbax.

Arrays are stored under the names of their places in the tree ("layers.0.mlp.up"), so that a checkpoint does not depend
on the classes that held them. What is static lies beside them as JSON. A save appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")
ARRAYS, ABOUT = "arrays", "about"


def save_pytree(tree: Any, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Save the arrays of a pytree, bit for bit, and a dictionary that JSON can hold. What was there is replaced.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
    """
    path = Path(path).absolute()
    if path.exists() and not (path / ABOUT).exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(fresh, args=ocp.args.Composite(**orbax_items(tree, about or {})), force=True)
    if jax.process_index() == 0:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pytree")


def restore_pytree(template: Tree, path: str | Path, *, cast: bool = False) -> Tree:
    """The arrays that `save_pytree` wrote, in the structure and on the devices of `template`.

    Args:
      template: a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings, shaped as what was saved.
      path: what was written.
      cast: convert to the template's dtypes; otherwise another dtype is an error.

    Raises:
      ValueError: one line that names the array that is missing, or has another shape or dtype.
    """
    path = Path(path).absolute()
    about = read_about(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(**{ARRAYS: restore_args(template, about, path, cast)})
        found = checkpointer.restore(path, args=args)
    return rebuild(template, found[ARRAYS])


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
            raise ValueError(f"{path}: array {name} is missing; it was saved from another model or version")
        if name not in wanted:
            raise ValueError(f"{path}: array {name} has no place here; it was saved from another model or version")
        dtype, *shape = saved[name]
        if tuple(shape) != wanted[name].shape or (dtype != str(wanted[name].dtype) and not cast):
            here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
            raise ValueError(f"{path}: array {name} is {dtype}{shape}, and {here} is expected")
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in wanted.items()
        if leaf.size
    }
    return ocp.args.PyTreeRestore(targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets))


def rebuild(template: Tree, arrays: Mapping[str, Any]) -> Tree:
    leaves = [
        arrays[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in named_arrays(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def read_about(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The dictionary that was saved beside the arrays.

    Raises:
      ValueError: there is no checkpoint at `path`, or one of another `kind`.
    """
    file = path / ABOUT / "metadata"
    if not file.exists():
        raise ValueError(f"no {kind or 'checkpoint'} at {path}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON") from error
    if kind is not None and about.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind}, but a {about.get('kind', 'pytree')}")
    return about


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places, such as "layers.0.mlp.up"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in flat]
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))
