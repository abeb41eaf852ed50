"""Pages of a stream on disk: written as the stream goes, read page by page by whoever asks about it later.

A folder has a manifest and two files a layer: `layer_000.pages` with the keys and values of one page behind another,
and `layer_000.index` with each page's mean key and checksums. Nothing of it is held in memory but the index. What a
crash or a copy has damaged is found by the checksums, page by page; the other pages stay readable.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from streamjax.checkpoints import SaveError, read_json, replace_text, require_file
from streamjax.field_checks import Size, check_fields

FORMAT = 1
_MANIFEST = "manifest.json"
_LARGEST = {"tokens": 2**48, "layers": 10_000, "kv_heads": 10_000, "head_dim": 100_000, "size": 10_000_000}
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_MOST_MISSING = 1_000_000  # pages that the index may lack and the others still be looked at


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """What pages of a stream are: `layers` files of pages of `size` tokens, K heads of width D, in `dtype`.

    model: a fingerprint of the model whose keys they are.
    """

    layers: Size
    kv_heads: Size
    head_dim: Size
    size: Size
    dtype: str
    model: str

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a page's record: keys and values, [2, K, S, D]."""
        return 2, self.kv_heads, self.size, self.head_dim

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

    @property
    def index_dtype(self) -> np.dtype:
        """Of a page's entry in the index: its mean key, the checksum of its record, and that of this entry."""
        mean = ("mean", "<f4", (self.kv_heads, self.head_dim))
        return np.dtype([mean, ("record", "<u4"), ("entry", "<u4")])

    def names(self, layer: int) -> tuple[str, str]:
        return f"layer_{layer:03d}.pages", f"layer_{layer:03d}.index"


class PageWriter:
    """Appends pages to a folder. A folder that holds pages already is refused.

    Raises:
      ValueError: the folder is not empty.
    """

    def __init__(self, folder: str | Path, layout: PageLayout):
        self.folder, self.layout, self.tokens = Path(folder), layout, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise ValueError(f"{folder} is not empty: write the pages of a stream into a folder of their own")
        self._files = [
            [(self.folder / name).open("wb", buffering=0) for name in layout.names(i)] for i in range(layout.layers)
        ]
        self._write_manifest()

    def append(
        self, keys: Sequence[Float[np.ndarray, "K N D"]], values: Sequence[Float[np.ndarray, "K N D"]], tokens: int
    ) -> None:
        """Append the next N slots of every layer, whole pages, of which the first `tokens` hold tokens.

        Raises:
          ValueError: no whole pages, or pages behind one that was not full.
          SaveError: the disk is full, or does not let itself be written to; the pages before stay readable.
        """
        size = self.layout.size
        if keys[0].shape[1] % size or not 0 < tokens <= keys[0].shape[1] or self.tokens % size:
            raise ValueError(f"pages of {size} tokens are written whole, one behind the other; only the last has room")
        dtype, starts = jnp.dtype(self.layout.dtype), [[file.tell() for file in pair] for pair in self._files]
        try:
            for (pages, index), k, v in zip(self._files, keys, values, strict=True):
                for start in range(0, tokens, size):
                    record = np.stack((k[:, start : start + size], v[:, start : start + size])).astype(dtype).tobytes()
                    entry = np.zeros((), self.layout.index_dtype)
                    entry["mean"] = np.asarray(k[:, start : min(start + size, tokens)], np.float32).mean(axis=1)
                    entry["record"] = zlib.crc32(record)
                    entry["entry"] = zlib.crc32(_unsigned(entry))
                    _write(pages, record)
                    _write(index, entry.tobytes())
            self.tokens += tokens
            self.flush()
        except OSError as error:
            self.tokens -= tokens * (self.tokens > self._listed)
            for pair, places in zip(self._files, starts, strict=True):
                for file, place in zip(pair, places, strict=True):
                    file.truncate(place)
                    file.seek(place)
            raise SaveError(
                f"{self.folder}: the next pages were not written: {error.strerror or error}; those of the first "
                f"{self.tokens} tokens are whole"
            ) from error

    def flush(self) -> None:
        """Make what was written visible to readers."""
        self._write_manifest()

    def close(self) -> None:
        """See that everything is on the disk, and let go of the files."""
        for pair in self._files:
            for file in pair:
                if not file.closed:
                    os.fsync(file.fileno())
                    file.close()

    def _write_manifest(self) -> None:
        values = {"format": FORMAT, "tokens": self.tokens, **dataclasses.asdict(self.layout)}
        values["checksum"] = _checksum(values)
        replace_text(self.folder / _MANIFEST, json.dumps(values, indent=1) + "\n")
        self._listed = self.tokens


class PageFiles:
    """The pages that a `PageWriter` wrote, possibly in another process.

    Attributes:
      tokens: of the stream.
      damaged: (layer, page) of pages that cannot be read: the file ends before them, or their index entry is wrong. A
        page whose own bytes are wrong is found when it is read.

    Raises:
      ValueError: there is no manifest, a damaged one or one of another format, or a file is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tokens, self.layout = _read_manifest(self.folder / _MANIFEST)
        self.pages = -(-self.tokens // self.layout.size)
        first = self.folder / self.layout.names(0)[1]
        require_file(first)
        there = first.stat().st_size // self.layout.index_dtype.itemsize
        if self.pages > there + _MOST_MISSING:
            raise ValueError(f"{self.folder / _MANIFEST}: it counts {self.pages} pages, and {first.name} has {there}")
        self._index = [self._read_index(layer) for layer in range(self.layout.layers)]
        self.damaged = [
            (layer, page) for layer, (_, good) in enumerate(self._index) for page in np.flatnonzero(~good).tolist()
        ]

    def means(self, layer: int) -> tuple[Float[np.ndarray, "P K D"], Any]:
        """The mean key of every page, and which pages can be read."""
        entries, good = self._index[layer]
        return entries["mean"].astype(np.float32), good

    def tokens_in(self, page: int) -> int:
        """Tokens of a page: all its slots but in the last one."""
        return min(self.tokens - page * self.layout.size, self.layout.size)

    def read(
        self, layer: int, pages: Int[np.ndarray, " N"]
    ) -> tuple[Float[np.ndarray, "N K S D"], Float[np.ndarray, "N K S D"]]:
        """Keys and values of some pages.

        Raises:
          ValueError: a page that is not there, or damaged; the message names file and page.
        """
        name, size = self.layout.names(layer)[0], self.layout.page_bytes
        index, good = self._index[layer]
        found = np.empty((len(pages), *self.layout.shape), jnp.dtype(self.layout.dtype))
        require_file(self.folder / name)
        for place, page in enumerate(np.asarray(pages).tolist()):
            if not 0 <= page < self.pages:
                raise ValueError(f"{self.folder / name}: there is no page {page}, the stream has {self.pages}")
            with (self.folder / name).open("rb", buffering=0) as file:  # a map of the file would end with the file
                file.seek(page * size)
                record = file.read(size) if good[page] else b""
            if zlib.crc32(record) != int(index["record"][page]) or len(record) != size:
                raise ValueError(
                    f"{self.folder / name}: page {page} is damaged, its checksum is wrong; other pages can be read"
                )
            found[place] = np.frombuffer(record, found.dtype).reshape(self.layout.shape)
        return found[:, 0], found[:, 1]

    def _read_index(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The index of a layer, zeros where the file has less, and which of its pages can be read."""
        files = [self.folder / name for name in self.layout.names(layer)]
        for file in files:
            require_file(file)
        data = files[1].read_bytes()
        dtype, entries = self.layout.index_dtype, np.zeros(self.pages, self.layout.index_dtype)
        there = min(len(data) // dtype.itemsize, self.pages)
        entries[:there] = np.frombuffer(data, dtype, there)
        whole = files[0].stat().st_size // self.layout.page_bytes
        good = np.array([zlib.crc32(_unsigned(entry)) == int(entry["entry"]) for entry in entries], bool)
        return entries, good & (np.arange(self.pages) < whole)


def _unsigned(entry: Any) -> bytes:
    """The bytes of an index entry that its checksum is of."""
    return entry["mean"].tobytes() + entry["record"].tobytes()


def _read_manifest(file: Path) -> tuple[int, PageLayout]:
    """Tokens of a stream, and the layout of its pages.

    Raises:
      ValueError: the file is missing, damaged, or of another format.
    """
    try:
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file.parent} holds no pages of a stream: {error}") from error
    checksum = values.pop("checksum", None)
    if checksum is not None and checksum != _checksum(values):
        raise ValueError(f"{file} has changed since it was written (its checksum differs): restore it from a copy")
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{file.parent}: pages in another format than {FORMAT}")
    kinds = {"tokens": int, "layers": int, "kv_heads": int, "head_dim": int, "size": int, "dtype": str, "model": str}
    if values.keys() != kinds.keys():
        raise ValueError(f"{file} is damaged: it has the fields {', '.join(values)}")
    for name, kind in kinds.items():
        value: Any = values[name]
        sensible = value in _DTYPES if name == "dtype" else True
        if type(value) is int:
            sensible = (name != "tokens") <= value <= _LARGEST.get(name, 0)
        if type(value) is not kind or not sensible:
            raise ValueError(f"{file} is damaged: field {name!r} is {value!r:.80}")
    tokens = values.pop("tokens")
    return tokens, PageLayout(**values)


def _checksum(values: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest's other fields."""
    return zlib.crc32(json.dumps(dict(values), sort_keys=True).encode())


def _write(file: io.FileIO, data: bytes) -> None:
    """All of the data: a file without a buffer may take less at once."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
