"""Saving and restoring with Orbax: models, streams, any pytree, and training runs that resume exactly.

Arrays are stored under the names of their places in the tree ("layers.0.mlp.up"), so that a checkpoint does not depend
on the classes that held them. What is static lies beside them as JSON (a model's configuration) or comes from the
template that is restored into (a stream's caches). A save appears whole or not at all.
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
from jax.sharding import Mesh
from jax.typing import DTypeLike

from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.hf import load_hf
from streamjax.models.layout import stack_layers, unstack_layers
from streamjax.models.lora import empty_adapters, ranks_of
from streamjax.models.native import is_native, load_native, named_arrays
from streamjax.parallel.mesh import with_placement
from streamjax.streaming.state import StreamState

Tree = TypeVar("Tree")
_ARRAYS, _ABOUT = "arrays", "about"


def save(model: Decoder, path: str | Path) -> None:
    """Save a model: its arrays and its configuration, to be read by `load`. An earlier checkpoint there is replaced.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
    """
    about = {"kind": "model", "model": model.config.to_json_dict(), "stacked": bool(len(model.stack))}
    about["lora"] = ranks_of(model)
    save_pytree(model, path, about)


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    scan_layers: bool | None = None,
) -> Decoder:
    """Load a model: a folder in Hugging Face's layout or streamjax's own, or a checkpoint that `save` wrote.

    Args:
      path: folder with config.json and *.safetensors, or a checkpoint.
      dtype: of parameters and activations; bfloat16 on TPU and GPU, float32 on CPU where None.
      mesh: place every parameter by `streamjax.parallel.rules`, each device reading its own part; the default device
        where None.
      scan_layers: whether repeating layers lie stacked (see `Decoder`); as it was saved where None.

    Raises:
      ValueError: one line that says what is wrong with the folder.
    """
    path = Path(path)
    if not (path / _ABOUT).exists():
        if (path / "config.json").exists():
            read = load_native if is_native(path) else load_hf
            return read(path, jnp.dtype(dtype) if dtype else None, mesh, bool(scan_layers))
        if (path / "model").exists():
            raise ValueError(f"{path} holds no model, but {path / 'model'} may: load that")
        raise ValueError(f"no model at {path}: neither config.json with *.safetensors, nor a streamjax checkpoint")
    about = read_about(path, "model")
    config = ModelConfig.from_json_dict(about["model"])
    adapters = {target: (rank, alpha) for target, (rank, alpha) in about.get("lora", {}).items()}
    dtype = jnp.dtype(dtype or default_dtype())

    def build(key: jax.Array) -> Decoder:
        model = Decoder(config, key, dtype=dtype, scan_layers=about["stacked"])
        return empty_adapters(model, adapters)

    model: Decoder = restore_pytree(with_placement(jax.eval_shape(build, jax.random.key(0)), mesh), path, cast=True)
    if scan_layers is None or scan_layers == about["stacked"]:
        return model
    return stack_layers(model) if scan_layers else unstack_layers(model)


def save_stream(state: StreamState, path: str | Path) -> None:
    """Save streams where they stand, to be continued bit for bit after `load_stream`.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
    """
    save_pytree(state, path, {"kind": "stream", "caches": [repr(cache) for cache in state.caches]})


def load_stream(path: str | Path, like: StreamState) -> StreamState:
    """Streams as they were saved.

    Args:
      path: what `save_stream` wrote.
      like: a state of the same model, caches and batch size, such as `init_state` makes; its content plays no part.

    Raises:
      ValueError: the stream was saved with other caches, or another model.
    """
    caches = read_about(Path(path), "stream")["caches"]
    for layer, (saved, cache) in enumerate(zip(caches, like.caches, strict=False)):
        if saved != repr(cache):
            raise ValueError(f"{path}: saved with {saved} in layer {layer}, which is {cache!r} here: use that cache")
    return restore_pytree(like, path)


def save_pytree(tree: Any, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Save the arrays of a pytree, bit for bit, and a dictionary that JSON can hold. What was there is replaced.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
    """
    path = Path(path).absolute()
    if path.exists() and not (path / _ABOUT).exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(fresh, args=ocp.args.Composite(**_items(tree, about or {})), force=True)
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
        args = ocp.args.Composite(**{_ARRAYS: _restore_args(template, about, path, cast)})
        found = checkpointer.restore(path, args=args)
    return _rebuild(template, found[_ARRAYS])


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
            self._manager.save(step, args=ocp.args.Composite(**_items(tree, about)))

    def restore(self, step: int, template: Tree) -> tuple[Tree, dict[str, Any]]:
        """The tree and the dictionary of `step`, in the structure and on the devices of `template`."""
        path = self._folder / str(step)
        about = read_about(path)
        args = ocp.args.Composite(**{_ARRAYS: _restore_args(template, about, path, cast=False)})
        return _rebuild(template, self._manager.restore(step, args=args)[_ARRAYS]), about

    def close(self) -> None:
        """Wait for a save that is under way, and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(tree: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax items: the arrays that hold anything, and the dictionary with every array's shape and dtype."""
    leaves = named_arrays(tree)
    described = {name: [str(leaf.dtype), *leaf.shape] for name, leaf in leaves.items()}
    arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
    return {_ARRAYS: ocp.args.PyTreeSave(arrays), _ABOUT: ocp.args.JsonSave({**about, "arrays": described})}


def _restore_args(template: Any, about: Mapping[str, Any], path: Path, cast: bool) -> Any:
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


def _rebuild(template: Tree, arrays: Mapping[str, Any]) -> Tree:
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
    file = path / _ABOUT / "metadata"
    if not file.exists():
        raise ValueError(f"no {kind or 'checkpoint'} at {path}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON") from error
    if kind is not None and about.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind}, but a {about.get('kind', 'pytree')}")
    return about
