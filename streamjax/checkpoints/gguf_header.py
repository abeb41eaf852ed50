"""The header of a GGUF file: its metadata, and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package knows the types and their
blocks. Its own reader believes every count in the file, and makes an array of every token of a vocabulary; this one
checks each count against the bytes that are left before it goes on, and takes a tenth of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from streamjax.checkpoints.json_files import one_line, require_file

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)  # GGUF's codes of values -> struct's letters
_STRING, _ARRAY = 8, 9
_LAYOUTS = {letter: struct.Struct("<" + letter) for letter in _SCALARS.values()}
_LEAST = {_STRING: 8, _ARRAY: 12, **{code: _LAYOUTS[letter].size for code, letter in _SCALARS.items()}}
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS, _LONGEST_NAME = 2**16, 2**20, 2**24, 2**12
_MOST_AXES, _DEEPEST = 4, 2
_MISSING: Any = object()


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name; there need be no such file."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file: where it lies and what it is, not its values.

    Attributes:
      name: such as "blk.0.attn_q.weight".
      kind: a `gguf.GGMLQuantizationType`.
      shape: of the values, slowest axis first, as numpy has it.
      row_bytes: bytes of one row: of the values along the last axis.
      offset: of the first byte in the file.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Attributes:
      file: its path.
      values: the metadata: numbers, booleans, strings, lists of strings, numpy arrays of numbers.
      tensors: by name.
    """

    file: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """A value of the metadata.

        Args:
          key: such as "general.architecture".
          kind: int, float, bool, str, list (of strings) or np.ndarray (of numbers).
          default: returned where the file has no such key.

        Raises:
          ValueError: it is missing and there is no default, or of another kind.
        """
        value = self.values.get(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.file}: its metadata have no {key!r}")
        if key not in self.values or (type(value) is int and kind is float):
            return value
        finite = type(value) is not float or math.isfinite(value)
        if type(value) is not kind or not finite:
            shown = value if np.isscalar(value) else type(value).__name__
            raise ValueError(f"{self.file}: {key!r} is {one_line(repr(shown))[:100]}; expected {kind.__name__}")
        return value


def read_header(file: Path) -> GGUFHeader:
    """Read the metadata and the places of all tensors; no tensor is read.

    Raises:
      ValueError: one line that names the file: it is none of GGUF, of another version, truncated, or says what cannot
        be.
    """
    require_file(file)
    with file.open("rb") as stream:
        start = stream.read(4)
        if start != b"GGUF":
            raise ValueError(f"{file}: no GGUF file: it begins with {start!r}, not with b'GGUF'")
        return _Reader(file, stream).header()


class _Reader:
    """The bytes of a file, read from front to back. No map of it: that ends the process where the file is cut."""

    def __init__(self, file: Path, stream: BinaryIO):
        self.file, self.stream, self.at = file, stream, stream.tell()
        self.size = os.fstat(stream.fileno()).st_size

    def take(self, size: int) -> bytes:
        found = self.stream.read(size) if self.at + size <= self.size else b""
        if len(found) < size:
            raise self.refuse(f"it ends at byte {self.size:,}, in its header")
        self.at += size
        return found

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.file}: damaged or truncated GGUF file ({reason})")

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in _VERSIONS:
            order = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
            known = " and ".join(map(str, _VERSIONS))
            raise ValueError(f"{self.file}: this GGUF file is {order}; streamjax reads versions {known}, little-endian")
        tensors = self.count("Q", "tensors", 24, _MOST_TENSORS)
        keys = self.count("Q", "values in the metadata", 13, _MOST_KEYS)
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name()
            if key in values:
                raise self.refuse(f"the key {key!r} stands twice in the metadata")
            values[key] = self.value(self.scalar("I"), key)
        places = [self.place() for _ in range(tensors)]
        return GGUFHeader(self.file, values, self.check(places, values))

    def scalar(self, letter: str) -> Any:
        layout = _LAYOUTS[letter]
        value = layout.unpack(self.take(layout.size))[0]
        return float(str(np.float32(value))) if letter == "f" else value  # 1e-05, not 9.999999747378752e-06

    def count(self, letter: str, what: str, least: int, most: int) -> int:
        """A number of things, each of which takes so many bytes at least."""
        number = self.scalar(letter)
        if number > most or number * least > self.size - self.at:
            raise self.refuse(f"{number} {what} at byte {self.at:,} of {self.size:,}")
        return number

    def text(self, longest: int) -> bytes:
        return self.take(self.count("Q", "characters", 1, longest))

    def name(self) -> str:
        text = self.text(_LONGEST_NAME)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"the name {text[:40]!r} is no UTF-8") from None

    def value(self, code: int, key: str, depth: int = 0) -> Any:
        if code == _STRING:
            return self.text(self.size).decode("utf-8", "replace")
        if code == _ARRAY and depth < _DEEPEST:
            inner = self.scalar("I")
            what = f"entries of {key!r}"
            if inner in (_STRING, _ARRAY):
                entries = range(self.count("Q", what, _LEAST[inner], _MOST_STRINGS))
                return [self.value(inner, key, depth + 1) for _ in entries]
            if inner in _SCALARS:
                number = self.count("Q", what, _LEAST[inner], self.size)
                return np.frombuffer(self.take(number * _LEAST[inner]), "<" + _SCALARS[inner])
            code = inner
        if code not in _SCALARS:
            raise self.refuse(f"{key!r} has the unknown type {code}")
        return self.scalar(_SCALARS[code])

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.name()
        axes = self.count("I", f"axes of {name!r}", 8, _MOST_AXES)
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def check(
        self, places: list[tuple[str, tuple[int, ...], int, int]], values: dict[str, Any]
    ) -> dict[str, GGUFTensor]:
        """The tensors; each lies in the file, and in no byte of another one."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        step = values.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step & (step - 1):
            raise self.refuse(f"'general.alignment' is {one_line(repr(step))[:40]}, which is no power of two")
        base = self.at + -self.at % step
        tensors: dict[str, GGUFTensor] = {}
        taken: list[tuple[int, int, str]] = []
        for name, shape, code, offset in places:
            if name in tensors:
                raise self.refuse(f"there are two tensors {name!r}")
            if code not in GGMLQuantizationType._value2member_map_:
                raise ValueError(
                    f"{self.file}: tensor {name!r} has the type {code}, which the gguf package does not know"
                )
            kind = GGMLQuantizationType(code)
            block, size = GGML_QUANT_SIZES[kind]
            if not shape or 0 in shape or shape[-1] % block:
                raise self.refuse(f"tensor {name!r} of type {kind.name} has the shape {list(shape)}")
            tensor = GGUFTensor(name, kind, shape, shape[-1] // block * size, base + offset)
            stop = tensor.offset + tensor.rows * tensor.row_bytes
            if stop > self.size:
                raise self.refuse(f"tensor {name!r} ends at byte {stop:,} of {self.size:,}; download it again")
            tensors[name] = tensor
            taken.append((tensor.offset, stop, name))
        taken.sort()
        for (_, stop, first), (start, _, second) in itertools.pairwise(taken):
            if start < stop:
                raise self.refuse(f"tensors {first!r} and {second!r} overlap")
        return tensors
