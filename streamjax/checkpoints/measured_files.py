"""What was measured of a model, in a safetensors file of one kind: numbers, and in its metadata whose they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from streamjax.checkpoints.json_files import require_file
from streamjax.checkpoints.user_paths import user_path


@contextmanager
def measured_file(path: str | Path, kind: str, what: str, otherwise: str) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """The opened file and its metadata, whose `kind` says what it is.

    Args:
      path: of the file.
      kind: what its metadata must say.
      what: such as "filters of queries", for the error.
      otherwise: what is wrong with a file of another kind.

    Raises:
      ValueError: no such file, one of another kind, or whatever goes wrong while it is read; one line that names it.
    """
    path = user_path(path)
    try:
        require_file(path)
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("kind") != kind:
                raise ValueError(otherwise)
            yield file, about
    except (OSError, KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no {what} could be read: {reason}") from None


Bound = tuple[str, int]  # ("window", W) or ("chunk", C): a layer of which nothing is measured, since it sees no more
Tables = Mapping[str, np.ndarray]  # what was measured of a layer, by the end of its name in the file


def save_layers(
    path: str | Path, layers: Sequence[Tables | Bound], *, kind: str, model: str, tokens: int, card: str
) -> None:
    """Write what was measured of each layer; the metadata is the card.

    Args:
      path: of the file.
      layers: their tables, or what bounds them.
      kind: of the file, as in `measured_file`.
      model: a fingerprint of the model's weights.
      tokens: how many were measured.
      card: what it is and what it is for.
    """
    arrays = {
        f"{i}{end}": table.copy()
        for i, layer in enumerate(layers)
        if not isinstance(layer, tuple)
        for end, table in layer.items()
    }
    bounds = [list(layer) if isinstance(layer, tuple) else None for layer in layers]
    about = {"kind": kind, "model": model, "tokens": str(tokens), "layers": json.dumps(bounds), "card": card}
    save_file(arrays, user_path(path), metadata=about)


def load_layers(
    path: str | Path, ends: Sequence[str], *, kind: str, what: str, otherwise: str, tables: str
) -> tuple[list[list[np.ndarray] | Bound], str, int]:
    """What `save_layers` wrote: of each layer its tables, in the order of `ends`, or what bounds it; model; tokens.

    Args:
      path, kind, what, otherwise: as in `measured_file`.
      ends: of the names that a layer's tables have.
      tables: such as "filters", for the error.

    Raises:
      ValueError: as in `measured_file`, or tables that are none.
    """
    with measured_file(path, kind, what, otherwise) as (file, about):
        model, tokens = about["model"], int(about["tokens"])
        layers: list[list[np.ndarray] | Bound] = []
        for i, bound in enumerate(json.loads(about["layers"])):
            if bound is not None:
                layers.append((str(bound[0]), int(bound[1])))
                continue
            found = [np.ascontiguousarray(file.get_tensor(f"{i}{end}"), np.float32) for end in ends]
            if any(x.ndim != 2 or not x.size or not np.isfinite(x).all() for x in found):
                raise ValueError(f"the {tables} of layer {i} are no table{'s' * (len(ends) > 1)} of numbers")
            layers.append(found)
        return layers, model, tokens
