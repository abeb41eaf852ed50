"""Safetensors on disk: one file or shards with an index, read by rows and written tensor by tensor.

Values are read into memory of our own: a map of the file would change with it, and end the process where the file is
cut. Reading holds some rows of a tensor at a time, writing one tensor. The format
(https://github.com/huggingface/safetensors): a little-endian uint64, that many bytes of JSON, the data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from streamjax.checkpoints import parse_json, read_json, require_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BLOCK = 1 << 22  # bytes that are read at a time
_INTEGERS: dict[str, Any] = {"I8": np.int8, "U8": np.uint8}  # codes of quantised weights
_CODES = {np.dtype(dtype): code for code, dtype in {**DTYPES, **_INTEGERS}.items()}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")


@runtime_checkable
class AnyTensor(Protocol):
    """A tensor in a file of any format; see `StoredTensor`."""

    @property
    def file(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read_rows(self, start: int, stop: int) -> np.ndarray: ...
    def blocks(self, start: int, stop: int, unit: int = 1) -> Iterator[tuple[int, int]]: ...


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where it lies and what it is, not its values."""

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop) along the first axis, read into memory.

        Raises:
          ValueError: a dtype that weights do not have here (quantised checkpoints), or the file has become shorter.
        """
        if self.code not in DTYPES:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} has dtype {self.code}; streamjax reads {', '.join(DTYPES)}"
            )
        values = np.empty((stop - start, *self.shape[1:]), DTYPES[self.code])
        read_bytes(self.file, self.offset + start * self.row_bytes, values.reshape(-1).view(np.uint8), self.name)
        return values

    @property
    def row_bytes(self) -> int:
        """Bytes of one place on the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(DTYPES[self.code]).itemsize

    def blocks(self, start: int, stop: int, unit: int = 1) -> Iterator[tuple[int, int]]:
        """[start, stop) in ranges of whole units of `unit` rows, of 4 MB or one unit, for `read_rows`."""
        return row_blocks(start, stop, unit, self.row_bytes)

    def read(self, dtype: Any = None) -> np.ndarray:
        """All values, in another dtype if one is given."""
        whole = dataclasses.replace(self, shape=self.shape or (1,))
        count = whole.shape[0]
        if dtype is None or self.code not in DTYPES or np.dtype(dtype) == np.dtype(DTYPES[self.code]):
            return whole.read_rows(0, count).reshape(self.shape)
        values = np.empty(whole.shape, dtype)
        for start, stop in whole.blocks(0, count):
            values[start:stop] = whole.read_rows(start, stop)
        return values.reshape(self.shape)


def code_of(dtype: Any) -> str:
    """What a file calls a dtype."""
    return _CODES[np.dtype(dtype)]


class Float32Rows:
    """A tensor whose rows are made, float32, from what a file has in another form."""

    def blocks(self: AnyTensor, start: int, stop: int, unit: int = 1) -> Iterator[tuple[int, int]]:
        """[start, stop) in ranges of whole units of `unit` rows, of 4 MB or one unit, for `read_rows`."""
        return row_blocks(start, stop, unit, 4 * math.prod(self.shape[1:]))


def read_bytes(file: Path, offset: int, into: np.ndarray, name: str) -> None:
    """Fill an array of bytes from a file.

    Raises:
      ValueError: the file, which had tensor `name` there, has become shorter.
    """
    rest = into.data
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise ValueError(f"{file} has become shorter while tensor {name!r} was read")
            rest = rest[count:]


def row_blocks(start: int, stop: int, unit: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges of whole units of `unit` rows, of 4 MB or one unit."""
    step = unit * max(_BLOCK // max(unit * row_bytes, 1), 1)
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by name. Only headers are read.

    Raises:
      ValueError: no safetensors, only pickle files, a missing shard, a damaged file, a tensor that is not where the
        index says; one line that names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    files, expected = _files(folder)
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise ValueError(f"{file}: tensor {tensor.name!r} is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    for name, file_name in expected.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{folder / file_name}: tensor {name!r} is missing, although {INDEX} lists it there")
    return tensors


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that make up a checkpoint, and which file each tensor is in where an index says so."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        values = read_json(folder / INDEX)
        expected = values.get("weight_map")
        if not isinstance(expected, dict) or not all(isinstance(v, str) for v in expected.values()):
            raise ValueError(f"{folder / INDEX}: no 'weight_map' from tensor names to file names")
        files = [folder / name for name in sorted(set(expected.values()))]
        for file in files:
            if file.parent != folder:
                raise ValueError(f"{folder / INDEX}: shard {file.name!r} lies outside of the folder")
            if not file.is_file():
                raise ValueError(f"{file}: this shard is missing, although {INDEX} lists it; download it again")
        return files, expected
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files, {}
    if files:
        raise ValueError(f"{folder}: {len(files)} safetensors files but neither {SINGLE} nor {INDEX}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: pickle files can run code and are not read; convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new, safe_serialization=True)"
        )
    raise ValueError(f"{folder}: no weights: expected {SINGLE}, or {INDEX} and its shards")


def read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of one file.

    Raises:
      ValueError: it is damaged.
    """
    require_file(file)
    try:
        with safe_open(file, framework="numpy"):
            pass  # checks the header, the offsets and the file's length
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: damaged or truncated safetensors file ({reason}); download it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: not a readable header ({' '.join(str(error).split())[:200]})") from error
    for name, entry in header.items():
        if name != "__metadata__":
            begin = entry["data_offsets"][0]
            yield StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)


def read_metadata(file: Path) -> dict[str, str]:
    """What a file that is not damaged says about its tensors."""
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata() or {})


@dataclasses.dataclass(frozen=True)
class PendingTensor:
    """A tensor that is about to be written: `values` is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def is_weights(name: str) -> bool:
    """Whether a file of this name in a folder is one that `write_tensors` writes."""
    return _WEIGHTS.fullmatch(name) is not None


def write_tensors(folder: Path, tensors: Sequence[PendingTensor], max_shard_size: int) -> None:
    """Write a checkpoint into a new folder: one file, or shards of at most `max_shard_size` bytes with an index.

    A shard has one tensor at least.
    """
    shards: list[list[PendingTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if count > 1:
        weights = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, tensors: Sequence[PendingTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for tensor in tensors:
        if tensor.dtype not in _CODES:
            raise ValueError(f"{file}: tensor {tensor.name!r} has dtype {tensor.dtype}; save {', '.join(DTYPES)}")
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.values(), dtype=tensor.dtype)
            assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
            stream.write(values.reshape(-1).view(np.uint8).data)
