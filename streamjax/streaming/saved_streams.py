"""Streams on disk: saved where they stand, continued bit for bit."""

from __future__ import annotations

from pathlib import Path

from streamjax.checkpoints import read_about, restore_pytree, save_pytree
from streamjax.streaming.state import StreamState


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
