"""What every layer of a stream's state holds, and how many bytes it is, before any of it is allocated."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike

from streamjax.byte_units import human_bytes
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.description import describe_cache, describe_tier
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.layer_caches.recurrence import BesideRecurrence
from streamjax.models.decoder import Decoder
from streamjax.streaming.state import empty_state, require_own_calibration

_HEADINGS = ("layers", "part", "tokens", "keys and values", "beside them", "bytes", "bytes a token")


@dataclasses.dataclass(frozen=True)
class PartSize:
    """One tier in layers that are alike: numbers are of one layer and one stream.

    layers: which; none of what is there once. part: the tier, in words. tokens: that it has room for; of the stream
    itself 0. content: bytes of keys and values. beside: bytes of all else, such as positions, notes and summaries.
    """

    layers: tuple[int, ...]
    part: str
    tokens: int
    content: int
    beside: int

    @property
    def bytes(self) -> int:
        return self.content + self.beside

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each token that there is room for; 0 where there is none."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """Sizes of a stream's state by part; `str` of it is a table. `total` is the bytes of all layers together."""

    parts: tuple[PartSize, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes * max(len(part.layers), 1) for part in self.parts)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_HEADINGS]
        for part in self.parts:
            sizes = f"{part.content:,}", f"{part.beside:,}", f"{part.bytes:,}", f"{part.bytes_per_token:,.1f}"
            tokens = f"{part.tokens:,}" if part.tokens else ""
            rows.append((_ranges(part.layers), part.part, tokens, *sizes[: 3 + bool(part.tokens)]))
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(_HEADINGS))]
        lines = ["  ".join(_aligned(cell, widths[i], i < 2) for i, cell in enumerate(row)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.total:,} bytes a stream in all ({human_bytes(self.total)})"])


def describe(cache: Cache | Sequence[Cache], model: Decoder, dtype: DTypeLike | None = None) -> CacheSizes:
    """What a stream through `cache` holds in each layer of `model`, and its bytes as they would be allocated.

    Nothing is allocated; the total is `sj.init_state(model, cache).cache_bytes`, in host memory too where tiers keep
    some of it there. Files on disk are not counted.

    >>> print(sj.kv.describe(sj.kv.preset("streaming_llm"), model))  # of a tiny model
    layers  part                    tokens  keys and values  beside them    bytes  bytes a token
    0-1     Sink(4) > Window(1020)   1,024           98,688        4,124  102,812          100.4
            the stream itself                             0           72       72
    205,696 bytes a stream in all (206 kB)

    Args:
      cache: for all layers, or one a layer.
      model: whose layers cache.
      dtype: of cached keys and values; the model's activation dtype where None.

    Raises:
      ValueError: what `sj.init_state` refuses.
    """
    require_own_calibration(model, cache)
    state = jax.eval_shape(lambda: empty_state(model, cache, dtype=dtype))
    alike: dict[tuple, list[int]] = {}
    for i, (kept, part) in enumerate(zip(state.caches, state.layers, strict=True)):
        alike.setdefault(tuple(_parts(kept, part)), []).append(i)
    found = [dataclasses.replace(part, layers=tuple(layers)) for parts, layers in alike.items() for part in parts]
    for group, part in enumerate(state.shared or ()):
        layers = [i for i, kept in enumerate(state.caches) if isinstance(kept, Cascade) and kept.borrows == group]
        size = part.position.shape[2]
        found.append(_part(f"what layers {_ranges(layers)} share", size, part))
    own = jax.tree.leaves(dataclasses.replace(state, layers=(), shared=None))
    return CacheSizes((*found, PartSize((), "the stream itself", 0, 0, sum(map(_size, own)))))


def _parts(cache: Cache, state: Any) -> Iterator[PartSize]:
    if isinstance(cache, HeadGroups):
        for cascade, heads, own in cache.parts(state):
            for part in _parts(cascade, own):
                yield dataclasses.replace(part, part=f"{part.part} in {heads} heads")
    elif isinstance(cache, BesideRecurrence):
        yield from _parts(cache.attention, state[0])
        yield from _parts(cache.recurrence, state[1])
    elif isinstance(cache, Cascade):
        for tier, own in zip(cache.tiers, state, strict=True):
            yield _part(describe_tier(tier), tier.slots, own)
    else:
        yield _part(describe_cache(cache), cache.slots, state)


def _part(words: str, tokens: int, state: Any) -> PartSize:
    sizes = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        sizes[any(getattr(key, "name", None) in ("k", "v") for key in path)] += _size(leaf)
    return PartSize((), words, tokens, sizes[True], sizes[False])


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _ranges(numbers: Iterable[int]) -> str:
    """Such as "0-3, 5"."""
    words = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        mine = [number for _, number in run]
        words.append(f"{mine[0]}" if len(mine) == 1 else f"{mine[0]}-{mine[-1]}")
    return ", ".join(words)


def _aligned(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
