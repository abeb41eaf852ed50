"""What was measured of a model, in a safetensors file of one kind: numbers, and in its metadata whose they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

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


def measured_kind(path: str | Path) -> str | None:
    """The kind of file that the metadata name; None where there is no such file, or it names none."""
    try:
        with safe_open(user_path(path), "numpy") as file:
            return (file.metadata() or {}).get("kind")
    except (OSError, SafetensorError):
        return None


Bound = tuple[str, int]  # ("window", W) or ("chunk", C): a layer of which nothing is measured, since it sees no more
Layer = TypeVar("Layer")
File = TypeVar("File", bound="MeasuredLayers")


@dataclasses.dataclass(frozen=True)
class MeasuredLayers(Generic[Layer]):
    """What was measured of each layer of a model: tables of numbers in a file. A subclass is a kind of such files.

    layers: what was measured of each, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were read.

    A subclass says `kind`, `what` and `otherwise` as in `measured_file`; `ends` of the names that a layer's tables have
    in the file; what `tables` are called in an error; and the `card`, what they are and what they are for.
    """

    kind: ClassVar[str]
    what: ClassVar[str]
    otherwise: ClassVar[str]
    ends: ClassVar[tuple[str, ...]]
    tables: ClassVar[str]
    card: ClassVar[str]

    layers: tuple[Layer | Bound, ...]
    model: str
    tokens: int

    @staticmethod
    def tables_of(layer: Layer) -> Sequence[np.ndarray]:
        """A layer's tables of float32, in the order of `ends`."""
        raise NotImplementedError

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Layer:
        """The inverse of `tables_of`.

        Raises:
          ValueError: tables that do not fit together; the message says what they are: "tables of (3, 4) and (5, 6)".
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        arrays = {
            f"{i}{end}": table.copy()
            for i, layer in enumerate(self.layers)
            if not isinstance(layer, tuple)
            for end, table in zip(self.ends, self.tables_of(layer), strict=True)
        }
        bounds = json.dumps([list(layer) if isinstance(layer, tuple) else None for layer in self.layers])
        about = {"kind": self.kind, "model": self.model, "tokens": str(self.tokens), "layers": bounds}
        save_file(arrays, user_path(path), metadata={**about, "card": self.card})

    @classmethod
    def load(cls: type[File], path: str | Path) -> File:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        with measured_file(path, cls.kind, cls.what, cls.otherwise) as (file, about):
            model, tokens = about["model"], int(about["tokens"])
            layers: list[Any] = []
            for i, bound in enumerate(json.loads(about["layers"])):
                if bound is not None:
                    layers.append((str(bound[0]), int(bound[1])))
                    continue
                found = [np.ascontiguousarray(file.get_tensor(f"{i}{end}"), np.float32) for end in cls.ends]
                if any(x.ndim != 2 or not x.size or not np.isfinite(x).all() for x in found):
                    raise ValueError(f"the {cls.tables} of layer {i} are no table{'s' * (len(found) > 1)} of numbers")
                try:
                    layers.append(cls.layer_of(found, model))
                except ValueError as error:
                    raise ValueError(f"layer {i} has {error}") from None
        return cls(tuple(layers), model, tokens)
