"""Pages of a stream on disk: written as the stream goes, memory-mapped by whoever asks about it later.

A folder has a manifest and two files a layer: `layer_000.pages` with the keys and values of one page behind another,
and `layer_000.index` with each page's mean key and checksums. Nothing of it is held in memory but the index. What a
crash or a copy has damaged is found by the checksums, page by page; the other pages stay readable.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from streamjax.field_checks import Size, check_fields

FORMAT = 1
_MANIFEST = "manifest.json"


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
        self._files = [[(self.folder / name).open("wb") for name in layout.names(i)] for i in range(layout.layers)]
        self._write_manifest()

    def append(
        self, keys: Sequence[Float[np.ndarray, "K N D"]], values: Sequence[Float[np.ndarray, "K N D"]], tokens: int
    ) -> None:
        """Append the next N slots of every layer, whole pages, of which the first `tokens` hold tokens.

        Raises:
          ValueError: no whole pages, or pages behind one that was not full.
        """
        size = self.layout.size
        if keys[0].shape[1] % size or not 0 < tokens <= keys[0].shape[1] or self.tokens % size:
            raise ValueError(f"pages of {size} tokens are written whole, one behind the other; only the last has room")
        dtype = jnp.dtype(self.layout.dtype)
        for (pages, index), k, v in zip(self._files, keys, values, strict=True):
            for start in range(0, tokens, size):
                record = np.stack((k[:, start : start + size], v[:, start : start + size])).astype(dtype).tobytes()
                entry = np.zeros((), self.layout.index_dtype)
                entry["mean"] = np.asarray(k[:, start : min(start + size, tokens)], np.float32).mean(axis=1)
                entry["record"] = zlib.crc32(record)
                entry["entry"] = zlib.crc32(_unsigned(entry))
                pages.write(record)
                index.write(entry.tobytes())
        self.tokens += tokens
        self.flush()

    def flush(self) -> None:
        """Make what was written visible to readers."""
        for pair in self._files:
            for file in pair:
                file.flush()
        self._write_manifest()

    def close(self) -> None:
        self.flush()
        for pair in self._files:
            for file in pair:
                file.close()

    def _write_manifest(self) -> None:
        values = {"format": FORMAT, "tokens": self.tokens, **dataclasses.asdict(self.layout)}
        beside = self.folder / f"{_MANIFEST}.partial"
        beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.folder / _MANIFEST)


class PageFiles:
    """The pages that a `PageWriter` wrote, possibly in another process.

    Attributes:
      tokens: of the stream.
      damaged: (layer, page) of pages that cannot be read: the file ends before them, or their index entry is wrong. A
        page whose own bytes are wrong is found when it is read.

    Raises:
      ValueError: there is no manifest, or one of another format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            values = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{folder} holds no pages of a stream: {_MANIFEST} is missing or damaged") from None
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{folder}: pages in another format than {FORMAT}")
        self.tokens: int = values.pop("tokens")
        self.layout = PageLayout(**values)
        self.pages = -(-self.tokens // self.layout.size)
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
        (index, good), data = self._index[layer], self._map(layer)
        found = np.empty((len(pages), *self.layout.shape), jnp.dtype(self.layout.dtype))
        for place, page in enumerate(np.asarray(pages).tolist()):
            if not 0 <= page < self.pages:
                raise ValueError(f"{self.folder / name}: there is no page {page}, the stream has {self.pages}")
            record = bytes(data[page * size : (page + 1) * size]) if good[page] else b""
            if zlib.crc32(record) != int(index["record"][page]) or len(record) != size:
                raise ValueError(
                    f"{self.folder / name}: page {page} is damaged, its checksum is wrong; other pages can be read"
                )
            found[place] = np.frombuffer(record, found.dtype).reshape(self.layout.shape)
        return found[:, 0], found[:, 1]

    def _map(self, layer: int) -> np.ndarray:
        file = self.folder / self.layout.names(layer)[0]
        return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)

    def _read_index(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The index of a layer, zeros where the file has less, and which of its pages can be read."""
        data = (self.folder / self.layout.names(layer)[1]).read_bytes()
        dtype, entries = self.layout.index_dtype, np.zeros(self.pages, self.layout.index_dtype)
        there = min(len(data) // dtype.itemsize, self.pages)
        entries[:there] = np.frombuffer(data, dtype, there)
        whole = len(self._map(layer)) // self.layout.page_bytes
        good = np.array([zlib.crc32(_unsigned(entry)) == int(entry["entry"]) for entry in entries], bool)
        return entries, good & (np.arange(self.pages) < whole)


def _unsigned(entry: Any) -> bytes:
    """The bytes of an index entry that its checksum is of."""
    return entry["mean"].tobytes() + entry["record"].tobytes()
