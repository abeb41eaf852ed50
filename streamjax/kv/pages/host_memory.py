"""Pages in the host's memory: a ring of keys and values of which a step touches few pages, copied in and out.

An accelerator reads and writes such a buffer by slices alone, whole pages of one head each, many under way at a time.
So what a step writes into is fetched, written to on the device, and put back; whatever is small, positions, counts,
scores and summaries, stays on the device. On a CPU both memories are one: buffers are plain there, and nothing here is
used but in tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import compute_on
from jaxtyping import Array, Float, Int32

from streamjax.kv.query import KVSpec, KVTokens
from streamjax.kv.slots.ring_buffer import read_ring, write_linear
from streamjax.kv.slots.ring_state import RingState, push, write

UNDER_WAY = 16  # copies that are begun before the first has to be there
PLAIN = ("cpu",)  # platforms whose device memory is the host's
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

# Called `compute_on` from JAX 0.12 on; there the older function of this name is gone.
_compute_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)


def in_host_memory(x: Array) -> bool:
    """Whether an array, or what is traced in its place, lies in the host's memory and not in the device's."""
    return jax.typeof(x).memory_space == _HOST


def host_buffer(spec: KVSpec, slots: int) -> Float[Array, "B K S D"]:
    """Zeros for `slots` keys or values in the host's memory, made there.

    Raises:
      ValueError: under a mesh of several devices.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        raise ValueError('placement "host" is for one device: use placement "device" on a mesh')
    if jax.default_backend() in PLAIN:
        return spec.buffer(slots)
    made: Array = _compute_on(lambda: spec.buffer(slots), compute_type="device_host", out_memory_spaces=_HOST)()
    return made


def compute_in_host(function: Callable[..., Any], *arguments: Array) -> Any:
    """What a function gives that runs on the host, on the device: what lies there goes to the host first.

    The function makes no arrays of its own, which would lie on the device: of arguments and plain numbers alone.
    """
    there = (x if in_host_memory(x) else jax.device_put(x, _HOST) for x in arguments)
    return _compute_on(function, compute_type="device_host", out_memory_spaces=_DEVICE)(*there)


def take_pages(buffer: Float[Array, "B K P S D"], chosen: Int32[Array, "B K N"]) -> Float[Array, "B K N S D"]:
    """The pages that each key head names, on the device. Numbers outside of the buffer name its ends."""
    rows, heads, pages, _, _ = buffer.shape
    flat = rearrange(buffer, "b k p s d -> (b k p) s d")
    index = flat_index(jnp.clip(chosen, 0, pages - 1), rows, heads, pages)

    def fetch(index: Array) -> Array:
        fetched = [jax.lax.dynamic_index_in_dim(flat, index[i], 0, keepdims=False) for i in range(index.shape[0])]
        return jnp.stack(jax.device_put(fetched, _DEVICE))

    groups = _grouped(index)
    found = fetch(groups[0])[None] if groups.shape[0] == 1 else jax.lax.map(fetch, groups)
    found = rearrange(found, "n g s d -> (n g) s d")[: index.shape[0]]
    return rearrange(found, "(b k n) s d -> b k n s d", b=rows, k=heads)


def put_pages(
    buffer: Float[Array, "B K P S D"], fresh: Float[Array, "B K N S D"], first: Int32[Array, " B"]
) -> Float[Array, "B K P S D"]:
    """The buffer with N <= P pages in a row, from `first` on, replaced; behind the last page comes page 0."""
    rows, heads, pages = buffer.shape[:3]
    run = (first[:, None, None] + jnp.arange(fresh.shape[2], dtype=jnp.int32)) % pages
    index = flat_index(jnp.broadcast_to(run, (rows, heads, fresh.shape[2])), rows, heads, pages)
    flat = rearrange(buffer, "b k p s d -> (b k p) s d")
    flat_fresh = rearrange(fresh.astype(buffer.dtype), "b k n s d -> (b k n) s d")
    groups = _grouped(index)

    def put(turn: Array | int, flat: Array) -> Array:
        for i in range(groups.shape[1]):
            # Where a group is not full it ends in its last page once more.
            place = jnp.minimum(turn * groups.shape[1] + i, index.shape[0] - 1)
            page = jax.device_put(jax.lax.dynamic_slice_in_dim(flat_fresh, place, 1), _HOST)
            flat = jax.lax.dynamic_update_slice(flat, page, (index[place], 0, 0))
        return flat

    flat = put(0, flat) if groups.shape[0] == 1 else jax.lax.fori_loop(0, groups.shape[0], put, flat)
    return rearrange(flat, "(b k p) s d -> b k p s d", b=rows, k=heads)


def write_pages(ring: RingState, tokens: KVTokens, size: int, keep: int) -> tuple[RingState, Float[Array, "B K N S D"]]:
    """`ring_state.write` into pages of `size`, and the keys of the pages that tokens may have gone to, N in a row.

    Raises:
      ValueError: more tokens at a time than stay.
    """
    rest, touched, _ = _changed(ring, tokens, size, keep, evict=False)
    return rest, touched


def push_pages(
    ring: RingState, tokens: KVTokens, size: int, keep: int
) -> tuple[RingState, Float[Array, "B K N S D"], KVTokens]:
    """`ring_state.push` into pages of `size`: the ring, the keys of the pages written to, and the tokens that fell out.

    Raises:
      ValueError: more tokens at a time than stay.
    """
    rest, touched, fallen = _changed(ring, tokens, size, keep, evict=True)
    assert fallen is not None
    return rest, touched, fallen


def touched_pages(tokens: int, size: int) -> int:
    """Pages in a row that so many tokens may lie in, wherever the first of them does."""
    return (tokens + size - 2) // size + 1


def _changed(
    ring: RingState, tokens: KVTokens, size: int, keep: int, evict: bool
) -> tuple[RingState, Float[Array, "B K N S D"], KVTokens | None]:
    width, slots = tokens.k.shape[2], ring.k.shape[2]
    if width > keep:
        raise ValueError(
            f"pages in the host's memory that keep {keep} tokens take at most that many at a time, got {width}: "
            "read the stream in smaller chunks"
        )
    start, count = tokens.run()
    # All but keys and values goes the usual way, with a channel of zeros in the place of these.
    thin = dataclasses.replace(ring, k=_one_channel(ring.k), v=_one_channel(ring.v))
    nothing = _one_channel(tokens.k)
    thin_tokens = dataclasses.replace(tokens, k=nothing, v=nothing, raw_k=nothing)
    fallen = None
    if evict:
        thin, fallen = push(thin, thin_tokens, keep)
        oldest = (ring.cursor - ring.filled) % slots
        k, v = (_read_slots(x, oldest, width, size) for x in (ring.k, ring.v))
        fallen = dataclasses.replace(fallen, k=k, v=v, raw_k=jnp.zeros_like(tokens.raw_k))
    else:
        thin = write(thin, thin_tokens, keep)
    k, touched = write_run(ring.k, tokens.k, ring.cursor, start, count, size)
    v, _ = write_run(ring.v, tokens.v, ring.cursor, start, count, size)
    return dataclasses.replace(thin, k=k, v=v), touched, fallen


def write_run(
    buffer: Float[Array, "B K S D"],
    chunk: Float[Array, "B K C D"],
    cursor: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    size: int,
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K N s D"]]:
    """The buffer with tokens [start, start + count) of a chunk in the slots from `cursor` on, and the pages of `size`
    that they may have gone to, which are fetched and put back."""
    pages, first = rearrange(buffer, "b k (p s) d -> b k p s d", s=size), cursor // size
    run = run_of_pages(pages, first, touched_pages(chunk.shape[2], size))
    line = write_linear(rearrange(run, "b k n s d -> b k (n s) d"), chunk, cursor % size, start, count, axis=2)
    fresh = rearrange(line, "b k (n s) d -> b k n s d", s=size)
    return rearrange(put_pages(pages, fresh, first), "b k p s d -> b k (p s) d"), fresh


def _read_slots(buffer: Array, oldest: Int32[Array, " B"], width: int, size: int) -> Float[Array, "B K N D"]:
    """`width` slots from `oldest` on, which wrap."""
    pages = rearrange(buffer, "b k (p s) d -> b k p s d", s=size)
    line = run_of_pages(pages, oldest // size, touched_pages(width, size))
    return read_ring(rearrange(line, "b k n s d -> b k (n s) d"), oldest % size, width, axis=2)


def run_of_pages(pages: Array, first: Int32[Array, " B"], count: int) -> Float[Array, "B K N S D"]:
    """So many pages in a row, on the device."""
    rows, heads, total = pages.shape[:3]
    run = (first[:, None, None] + jnp.arange(count, dtype=jnp.int32)) % total
    return take_pages(pages, jnp.broadcast_to(run, (rows, heads, count)))


def flat_index(chosen: Int32[Array, "B K N"], rows: int, heads: int, pages: int) -> Int32[Array, " M"]:
    """Numbers of pages where those of all rows and heads lie in one line."""
    base = jnp.arange(rows * heads, dtype=jnp.int32).reshape(rows, heads, 1) * pages
    return (base + chosen.astype(jnp.int32)).reshape(-1)


def _grouped(index: Int32[Array, " M"]) -> Int32[Array, "N G"]:
    """Page numbers that are worked on together; the last one again where a group is not full."""
    group = min(UNDER_WAY, index.shape[0])
    return jnp.pad(index, (0, -index.shape[0] % group), mode="edge").reshape(-1, group)


def _one_channel(x: Array) -> Array:
    return jnp.zeros((*x.shape[:3], 1), x.dtype)
