"""`Lines`: keeps every token, and a chunk of queries reads the lines of the attention matrix that hold most of it.

LoopServe (Li et al., 2507.13681), after MInference (2407.02490): attention of many queries lies on few vertical lines,
keys that all of them look at, and slash lines, distances that all of them look back. Which ones that are differs from
input to input and from head to head, so a few queries of each chunk are asked, and the others read the lines found.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int32

from pallas_kernels.partial import Partial, merge
from streamjax.field_checks import Fraction, Size
from streamjax.kv.query import KVSpec, Query
from streamjax.kv.tiers.full import Full, LinearState

TILE = 256  # vertical lines that are gathered at a time


class Chosen(NamedTuple):
    """The lines of each key head, best first. key, band: their numbers. keys, bands: how many of them are read."""

    key: Int32[Array, "B K S"]
    keys: Int32[Array, "B K"]
    band: Int32[Array, "B K N"]
    bands: Int32[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Lines(Full):
    """`Full`, of whose tokens a chunk of several queries reads those on the lines that hold a `share` of attention.

    A line is a key, or a band of `band` neighbouring distances. For each key head lines are taken in the order of the
    attention that a few queries give them, for as much as they cost, until they hold `share` of all that these queries
    give to what is stored. Every query reads its own chunk in full, and a single one reads everything. Which lines are
    read depends on how a stream is cut into chunks; what is stored does not.

    Args:
      capacity: see `Full`; the tier takes no codec.
      share: of the attention of the queries that are asked; 1 reads everything.
      sample: queries of a chunk that are asked, evenly spread, the last one among them.
      band: distances that are one line.
      least: while fewer tokens are stored all are read.

    Raises:
      ValueError: numbers out of range, or a codec.
    """

    keeps_all: ClassVar[bool] = True

    share: Fraction = 0.95
    sample: Size = 32
    band: Size = 64
    least: Size = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec is not None:
            raise ValueError("Lines.codec: lines are read of keys as they are, use Full for a codec")

    def init(self, spec: KVSpec) -> LinearState:
        if spec.per_head:
            raise ValueError("Lines are distances of one list of tokens: no tier in front may evict for each head")
        return super().init(spec)

    def attend(self, state: LinearState, query: Query, reach: int | None) -> Partial:
        if query.q.shape[1] == 1 or query.differentiable or self.share == 1:
            return super().attend(state, query, reach)
        many = jnp.max(state.filled) >= self.least

        def some() -> Partial:
            return self._read(state, query, self._choose(state, query))

        return jax.lax.cond(many, some, lambda: super(Lines, self).attend(state, query, reach))

    def _distances(self, state: LinearState, query: Query) -> Int32[Array, "B C"]:
        """How far each query stands behind slot 0; the tokens of a row lie side by side."""
        return (query.position - state.position[:, 0, :1]).astype(jnp.int32)

    def _choose(self, state: LinearState, query: Query) -> Chosen:
        heads, slots = state.k.shape[1:3]
        rows, width = query.q.shape[:2]
        count = jnp.full((rows,), width) if query.valid is None else jnp.sum(query.valid, axis=1)
        asked = min(self.sample, width)
        place = jnp.maximum((jnp.arange(asked) + 1) * count[:, None] // asked - 1, 0).astype(jnp.int32)

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)

        own: dict[str, Any] = {name: take(getattr(query, name)) for name in ("q", "raw_q", "position")}
        own["back"] = None if query.back is None else take(query.back)
        few = dataclasses.replace(query, valid=jnp.broadcast_to((count > 0)[:, None], place.shape), **own)
        few = jax.lax.stop_gradient(few)
        lse = few.attend(state.k, state.v, state.position, state.valid, filled=state.filled).lse
        shares = few.mass(
            state.k, state.position, state.valid, lse, filled=state.filled,
            fold=lambda shares: rearrange(jnp.sum(shares, axis=2), "b k c s -> b (k c) s"),
        )  # fmt: skip
        shares = rearrange(shares, "b (k c) s -> b k c s", k=heads)

        away = take(self._distances(state, query))
        bands = (slots + width - 1) // self.band + 1
        which = jnp.clip((away[..., None] - jnp.arange(slots)) // self.band, 0, bands - 1)  # [B, C, S]
        begins = away[..., None] - self.band * jnp.arange(bands + 1) + 1  # the slot behind the last of each band
        sums = jnp.pad(jnp.cumsum(shares, axis=3), ((0, 0), (0, 0), (0, 0), (1, 0)))
        at = jnp.clip(begins, 0, slots)[:, None]
        upto = jnp.take_along_axis(sums, jnp.broadcast_to(at, (*shares.shape[:3], bands + 1)), axis=3)
        band_mass = jnp.sum(upto[..., :-1] - upto[..., 1:], axis=2) / self.band
        worth = jnp.concatenate((jnp.sum(shares, axis=2), band_mass), axis=2)
        order = jnp.argsort(-worth, axis=2, stable=True).astype(jnp.int32)
        place = jnp.argsort(order, axis=2).astype(jnp.int32)
        of_key, of_band = place[..., :slots], place[..., slots:]
        shape = (*shares.shape[:3], bands)
        by_band = jnp.take_along_axis(
            jnp.broadcast_to(of_band[:, :, None], shape), jnp.broadcast_to(which[:, None], shares.shape), axis=3
        )
        first = jnp.minimum(of_key[:, :, None], by_band)  # the line that reads each pair first
        wanted = self.share * jnp.sum(shares, axis=(2, 3))

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # too few lines, and enough
            middle = (low + high) // 2
            held = jnp.sum(jnp.where(first < middle[..., None, None], shares, 0), axis=(2, 3))
            enough = held >= wanted
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        total = slots + bands
        none = jnp.full((rows, heads), -1, jnp.int32)
        _, lines = jax.lax.fori_loop(0, (total + 1).bit_length(), halve, (none, jnp.full_like(none, total)))
        return Chosen(
            jnp.argsort(of_key, axis=2).astype(jnp.int32),
            jnp.sum(of_key < lines[..., None], axis=2, dtype=jnp.int32),
            jnp.argsort(of_band, axis=2).astype(jnp.int32),
            jnp.sum(of_band < lines[..., None], axis=2, dtype=jnp.int32),
        )

    def _read(self, state: LinearState, query: Query, chosen: Chosen) -> Partial:
        heads, slots = state.k.shape[1:3]
        tile, width = min(TILE, slots), query.q.shape[1]
        valid = jnp.broadcast_to(state.valid, (state.k.shape[0], heads, slots))
        index = jnp.arange(slots, dtype=jnp.int32)
        upright = jnp.take_along_axis(
            jnp.broadcast_to(index, chosen.key.shape) < chosen.keys[..., None], jnp.argsort(chosen.key, axis=2), axis=2
        )

        def gather(slot: Int32[Array, "B K N"]) -> tuple[Array, Array, Array]:
            k, v = (jnp.take_along_axis(x, slot[..., None], axis=2, mode="clip") for x in (state.k, state.v))
            position = jnp.broadcast_to(state.position, (*slot.shape[:2], slots))
            return k, v, jnp.take_along_axis(position, slot, axis=2, mode="clip")

        def keys(turn: Array, part: Partial) -> Partial:
            start = jnp.minimum(turn * tile, slots - tile)  # the last tile is moved back to fit
            slot = jax.lax.dynamic_slice_in_dim(chosen.key, start, tile, 2)
            place = start + jnp.arange(tile)
            mine = (place >= turn * tile) & (place < chosen.keys[..., None])
            return merge(part, query.attend(*gather(slot), mine & jnp.take_along_axis(valid, slot, axis=2)))

        away = self._distances(state, query)

        def bands(turn: Array, part: Partial) -> Partial:
            band = jax.lax.dynamic_index_in_dim(chosen.band, turn, 2, keepdims=False)  # [B, K]
            first = away[:, None, :1] - self.band * (band[..., None] + 1) + 1
            slot = first + jnp.arange(width + self.band - 1, dtype=jnp.int32)
            inside = (slot >= 0) & (slot < slots) & (turn < chosen.bands)[..., None]
            slot = jnp.clip(slot, 0, slots - 1)
            free = inside & jnp.take_along_axis(valid & ~upright, slot, axis=2)
            mine = (away[:, None, :, None] - slot[:, :, None]) // self.band == band[..., None, None]
            return merge(part, query.attend(*gather(slot), mine & free[:, :, None]))

        part = jax.lax.fori_loop(0, (jnp.max(chosen.keys) + tile - 1) // tile, keys, query.nothing())
        return jax.lax.fori_loop(0, jnp.max(chosen.bands), bands, part)
