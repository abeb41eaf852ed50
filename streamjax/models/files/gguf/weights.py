"""Tensors of a GGUF file as those of a Hugging Face checkpoint: other names and orders of rows, and no blocks.

Blocks of weights lie along the last axis, so that rows are read and dequantised alone, some at a time.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from streamjax.checkpoints.gguf_header import GGUFTensor
from streamjax.models.files.safetensors_files import Float32Rows, read_bytes

_SPARSE = 4  # so many times the rows that are needed are read at once


@lru_cache(maxsize=64)
def can_dequantise(kind: Any) -> bool:
    """Whether numbers can be made of blocks of a kind, a `gguf.GGMLQuantizationType`."""
    import gguf

    try:
        dequantise(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def dequantise(blocks: np.ndarray, kind: Any) -> np.ndarray:
    """The values of rows of blocks.

    Args:
      blocks: uint8 [R, B].
      kind: of the blocks.

    Returns:
      float32 [R, values].
    """
    import gguf

    if kind == gguf.GGMLQuantizationType.F64:
        return blocks.view("<f8").astype(np.float32)
    return gguf.dequantize(blocks, kind)


@dataclasses.dataclass(frozen=True, eq=False)
class DequantisedTensor(Float32Rows):
    """A tensor of a Hugging Face checkpoint that is made from one in a GGUF file; see `StoredTensor`.

    Attributes:
      file: the GGUF file.
      name: in the file.
      shape: as Hugging Face has it.
      stored: where it lies.
      first: the row there with which this one begins, where it is a part of what is stored.
      order: for each row here the row there; None: the same.
      shift: what is added to the values.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    stored: GGUFTensor
    first: int = 0
    order: np.ndarray | None = None
    shift: float = 0.0

    @property
    def code(self) -> str:
        """The dtype of `read_rows`, or the name of a kind of blocks that cannot be read."""
        return "F32" if can_dequantise(self.stored.kind) else self.stored.kind.name

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop) along the first axis, float32.

        Raises:
          ValueError: the file has become shorter.
        """
        shape = (stop - start, *self.shape[1:])
        if len(shape) == 1:  # one row of blocks holds it all
            values = dequantise(self._blocks(0, 1), self.stored.kind).reshape(-1)
            values = values[start:stop] if self.order is None else values[self.order[start:stop]]
        else:
            each = math.prod(shape[1:-1])
            first, last = start * each, stop * each
            if self.order is None:
                blocks = self._blocks(self.first + first, self.first + last)
            else:
                blocks = self._gathered(self.order[first:last])
            values = dequantise(blocks, self.stored.kind)
        values = values.reshape(shape)
        return values if not self.shift else values + np.float32(self.shift)

    def _blocks(self, start: int, stop: int) -> np.ndarray:
        """The bytes of rows in the file, uint8 [R, B]."""
        stored = self.stored
        found = np.empty((stop - start, stored.row_bytes), np.uint8)
        read_bytes(self.file, stored.offset + start * stored.row_bytes, found.reshape(-1), stored.name)
        return found

    def _gathered(self, order: np.ndarray) -> np.ndarray:
        """The bytes of rows that lie apart: read with what is between them, unless that is most of it."""
        low, high = int(order.min()), int(order.max()) + 1
        if high - low <= _SPARSE * len(order):
            return self._blocks(low, high)[order - low]
        runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
        return np.concatenate([self._blocks(int(run[0]), int(run[-1]) + 1) for run in runs])


@dataclasses.dataclass(frozen=True, eq=False)
class TurnedTensor(Float32Rows):
    """A tensor whose columns take turns in several parts; where it has three axes, the parts have the last two swapped.

    Attributes:
      parts: all of one shape.
      turns: whether columns take turns; else those of the first part come first.

    Raises:
      ValueError: they are not.
    """

    parts: tuple[DequantisedTensor, ...]
    turns: bool = True

    def __post_init__(self) -> None:
        for part in self.parts:
            _check_fit(part, self.parts[0], part.shape == self.parts[0].shape)

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return self.parts[0].file

    @property
    def name(self) -> str:
        """The name of the first part in the file."""
        return self.parts[0].name

    @property
    def code(self) -> str:
        """That of the first part that cannot be read, or "F32"."""
        return next((part.code for part in self.parts if part.code != "F32"), "F32")

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it."""
        shape = self.parts[0].shape
        shape = shape if len(shape) < 3 else (shape[0], shape[2], shape[1])
        return (*shape[:-1], shape[-1] * len(self.parts))

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop) along the first axis, float32; see `DequantisedTensor.rows`."""
        values = [part.read_rows(start, stop) for part in self.parts]
        if len(self.parts[0].shape) == 3:
            values = [part.swapaxes(1, 2) for part in values]
        if len(values) == 1:
            return values[0]
        return np.stack(values, -1).reshape(stop - start, *self.shape[1:]) if self.turns else np.concatenate(values, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyValueTensor(Float32Rows):
    """DeepSeek's projection of a latent to keys and values, head by head, which llama.cpp has split.

    Attributes:
      keys: [heads, latent, width].
      values: [heads, width, latent].

    Raises:
      ValueError: their shapes do not fit together.
    """

    keys: DequantisedTensor
    values: DequantisedTensor

    def __post_init__(self) -> None:
        keys, values = self.keys.shape, self.values.shape
        _check_fit(self.values, self.keys, len(keys) == len(values) == 3 and keys[:2] == values[::2])

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return self.keys.file

    @property
    def name(self) -> str:
        """The name of the keys' part in the file."""
        return self.keys.name

    @property
    def code(self) -> str:
        """That of the part that cannot be read, or "F32"."""
        return self.values.code if self.keys.code == "F32" else self.keys.code

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it: [heads * (width of keys + width of values), latent]."""
        heads, latent, width = self.keys.shape
        return heads * (width + self.values.shape[1]), latent

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop) along the first axis, float32; see `DequantisedTensor.rows`."""
        each = self.shape[0] // self.keys.shape[0]
        first, last = start // each, -(-stop // each)
        parts = self.keys.read_rows(first, last).swapaxes(1, 2), self.values.read_rows(first, last)
        return np.concatenate(parts, axis=1).reshape(-1, self.shape[1])[start - first * each : stop - first * each]


def _check_fit(part: DequantisedTensor, first: DequantisedTensor, fits: bool) -> None:
    """Refuse parts of one tensor that do not fit together."""
    if not fits:
        shapes = f"has the shape {list(part.shape)}, and {first.name!r} has {list(first.shape)}"
        raise ValueError(f"{part.file}: tensor {part.name!r} {shapes}")
