"""A few queries over slots of a cache, wherever these lie: what the decoding kernels for GPUs share.

A program takes one share of the slots that the queries of a key head see, and loops over blocks of them with an online
softmax; how many there are is known only when it runs, and the shares are equal whatever it is. Their partials are
merged outside (Lean Attention, 2405.10480). Slots are gathered by their numbers, so that a ring that wraps and pages in
any order cost the same, and what is not there is not loaded.

The rows of a product are all queries of a key head together, sixteen at least. Quantised slots are widened in
registers; scales multiply logits and weights. Two numbers in a byte make two parts of the channels, each with products
of its own; of `Coded` slots, of which several share a byte, each reads its byte; others are unpacked as their codec
says. Triton's blocks are powers of two: channels beyond the width read as 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.block_ranges import divide
from pallas_kernels.coded import Coded
from pallas_kernels.gpu import slot_codes
from pallas_kernels.gpu.exponentials import MASKED, exp2
from pallas_kernels.gpu.flash_operands import dot
from pallas_kernels.partial import Partial, merge_stacked
from pallas_kernels.tile_logits import LOG2E
from pallas_kernels.unpacking.protocol import Unpackable, Unpacking, broadcast_index

LEAST = 16  # the smallest side of a product
ROWS, ROW_BYTES = 64, 2**14  # of a product, at most, and of its queries
BLOCK = 128  # slots, at most
BLOCK_BYTES = 2**15  # of the keys and values of a block: three of them are on their way or worked on
PROGRAMS = 2 * 132  # that an H100 runs at once
SHARE = 256  # slots for which a program of their own is worth it
MAX_WIDTH = 256
INDEXED = 2**31  # numbers that a 32-bit offset reaches

Reads = slot_codes.Reads
Place = Callable[[jax.Array], tuple[jax.Array, jax.Array | None, jax.Array | None]]
# What rows of queries see, by their numbers, as `low, stop, place`: entries low to stop - 1 of a list of slots. `place`
# of some of these entries is their slots, which of them hold something and which each row sees; None for all.
Find = Callable[[Reads, jax.Array], tuple[Any, Any, Place]]


@dataclasses.dataclass(frozen=True)
class Few:
    """scale, softcap: of the logits. block: slots at once. shares: programs for the slots of a key head.
    width: channels of a part. rows: of queries of a key head. interpreted: whether an interpreter runs it. coded: of k
    and v, how they lie where they are codes. together: of how many slots shares are."""

    scale: float
    softcap: float | None
    block: int
    shares: int
    width: int
    rows: int
    interpreted: bool
    coded: Mapping[str, slot_codes.Coding | Unpacking]
    together: int

    @property
    def exponent(self) -> float:
        """What a logit is multiplied with in the exponent of 2."""
        return LOG2E * (self.scale if self.softcap is None else 1.0)


def attend(
    name: str,
    find: Find,
    q: Float[Array, "B C H D"],
    operands: Mapping[str, Array | Coded | Unpackable],
    *,
    scale: float,
    softcap: float | None,
    splits: int | None,
    block: int | None,
    most: int,
    interpret: bool,
    listed: bool = False,
) -> Partial:
    """Attention of `q` over what `find` names of a cache.

    Args:
      name: of the kernel.
      find: see `Find`.
      operands: k, v [B, K, S, D or D / 2], or codes; k_scale, v_scale [B, K, S]; others [B], [B, N] or [B, K, N]. A
        buffer [1, K, S, D] is that of all rows.
      splits: shares; as many as fill the GPU where None. most: entries that a key head can have.
      block: slots that are read at once, a power of two from 16.
      listed: whether slots follow from a list in memory, which has to be read before they can be.

    Raises:
      ValueError: heads wider than the kernel takes, blocks of another size, or a cache beyond 32-bit offsets.
    """
    coded = slot_codes.codings(operands)
    together = slot_codes.slots_together(operands)
    operands = slot_codes.flat(operands)
    cache = operands["k"]
    if q.shape[3] > MAX_WIDTH:
        raise ValueError(f"heads of width {q.shape[3]}: the Triton kernel takes {MAX_WIDTH} at most")
    if cache.dtype.itemsize == 1 and INDEXED < cache.size <= 2 * INDEXED:  # above, Pallas takes 64-bit offsets
        raise ValueError(f"{cache.size} bytes of quantised keys: the Triton kernel takes up to 2^31, or over 2^32")
    parts = 2 if cache.dtype == jnp.uint8 and not coded else 1
    grouped = rearrange(q, "b c (k g) (n d) -> n b k (g c) d", k=cache.shape[1], n=parts)
    _, batch, heads, count, width = grouped.shape
    padded = max(pl.next_power_of_2(width), LEAST)
    if block is None:
        itemsize = q.dtype.itemsize if coded else cache.dtype.itemsize  # codes take room as what is made of them
        block = BLOCK_BYTES // (2 * parts * padded * itemsize)
        block = min(max(block, LEAST), BLOCK // 2 if listed or coded else BLOCK, max(pl.next_power_of_2(most), LEAST))
        block = min(block, together) if together > 1 else block
    if together > 1 and block > together:
        raise ValueError(f"blocks of {block} slots: these codes take up to {together} at once")
    if block < LEAST or block & (block - 1):
        raise ValueError(f"blocks of {block} slots: use a power of two from {LEAST}")
    rows = min(max(pl.next_power_of_2(count), LEAST), ROWS, ROW_BYTES // (parts * padded * q.dtype.itemsize))
    if splits is None:
        splits = max(min(PROGRAMS // (batch * heads * pl.cdiv(count, rows)), most // SHARE), 1)
    few = Few(scale, softcap, block, splits, width, count, interpret, coded, max(LEAST, together))

    arrays = {**{f"q{n}": part for n, part in enumerate(grouped)}, **operands}
    specs = {name: _spec(x.shape, shared=len(x) == 1 and x.ndim > 2) for name, x in arrays.items()}
    query = pl.BlockSpec((None, None, rows, padded), lambda r, s, b, h: (b, h, r, 0))
    specs |= {f"q{n}": query for n in range(parts)}
    *out, lse = pl.pallas_call(
        partial(_kernel, few, find, list(arrays)),
        grid=(pl.cdiv(count, rows), splits, batch, heads),
        in_specs=[specs[name] for name in arrays],
        out_specs=[
            *[pl.BlockSpec((None, None, None, rows, padded), lambda r, s, b, h: (b, h, s, r, 0))] * parts,
            pl.BlockSpec((None, None, None, rows), lambda r, s, b, h: (b, h, s, r)),
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct((batch, heads, splits, count, width), jnp.float32)] * parts,
            jax.ShapeDtypeStruct((batch, heads, splits, count), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2 if coded else 5 if listed else 3),
        interpret=few.interpreted,
        name=name,
    )(*arrays.values())
    shares = Partial(
        rearrange(out, "n b k s (g c) d -> s b c (k g) (n d)", c=q.shape[1]),
        rearrange(lse, "b k s (g c) -> s b c (k g)", c=q.shape[1]),
    )
    return merge_stacked(shares)


def _spec(shape: tuple[int, ...], shared: bool) -> pl.BlockSpec:
    """What a program sees of an operand: a row's number or table, or the part of a row, or of all, for a key head."""
    if len(shape) == 1:
        return pl.BlockSpec((1,), lambda r, s, b, h: (b,))
    if len(shape) == 2:
        return pl.BlockSpec((None, shape[1]), lambda r, s, b, h: (b, 0))
    rest = [0] * (len(shape) - 2)
    heads = shape[1]
    return pl.BlockSpec(
        (None, None, *shape[2:]), lambda r, s, b, h: (0 if shared else b, broadcast_index(h, heads), *rest)
    )


def _kernel(few: Few, find: Find, names: list[str], *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    *out, lse = refs[len(names) :]
    rows, padded = out[0].shape
    row = pl.program_id(0) * rows + jnp.arange(rows)
    inside = (row < few.rows)[:, None] & (jnp.arange(padded) < few.width)[None]
    q = [plgpu.load(read[f"q{n}"], mask=inside, other=0.0) for n in range(len(out))]

    low, stop, place = find(read, row)
    share = divide(jnp.maximum(stop - low, 0) + few.shares - 1, few.shares)
    each = divide(share + few.together - 1, few.together) * few.together
    low += pl.program_id(1) * each
    stop = jnp.minimum(low + each, stop)
    steps = divide(jnp.maximum(stop - low, 0) + few.block - 1, few.block)

    def add(i: Any, carry: Any) -> Any:
        entry = low + i * few.block + jnp.arange(few.block)
        slot, holds, seen = place(jnp.minimum(entry, stop - 1))
        there = entry < stop if holds is None else (entry < stop) & holds
        return _add(few, read, q, slot, there, seen, carry)

    start = (
        jnp.full(rows, MASKED * few.exponent, jnp.float32),  # exponents of 2
        jnp.zeros(rows, jnp.float32),
        tuple(jnp.zeros((rows, padded), jnp.float32) for _ in q),
    )
    top, total, sums = lax.fori_loop(0, steps, add, start)
    some = top > 0.5 * MASKED * few.exponent
    divisor = jnp.where(some, total, 1.0)
    for ref, part in zip(out, sums, strict=True):
        plgpu.store(ref, jnp.where(some[:, None], part / divisor[:, None], 0.0), mask=inside)
    found = jnp.where(some, top / LOG2E + jnp.log(divisor), -jnp.inf)
    plgpu.store(lse, found, mask=row < few.rows)


def _add(
    few: Few, read: Reads, q: list[jax.Array], slot: jax.Array, there: jax.Array, seen: jax.Array | None, carry: Any
) -> Any:
    """The state of the softmax, largest logits, sums of weights and weighted values, with one more block of slots."""
    top, total, sums = carry
    channel = jnp.arange(q[0].shape[1])
    mask = there[:, None] & (channel < few.width)[None]

    def load(name: str) -> list[jax.Array]:
        if name in few.coded:
            found = slot_codes.decoded(few.coded[name], read, name, slot, channel, there, few.width, q[0].dtype)
            return [found.astype(q[0].dtype)]
        block = plgpu.load(read[name].at[slot[:, None], channel[None]], mask=mask, other=0)
        return _widened(block, q[0].dtype)

    def factor(name: str) -> jax.Array:
        return plgpu.load(read[name].at[slot], mask=there, other=0.0)[None]

    scores = sum(dot(a, b.T) for a, b in zip(q, load("k"), strict=True))
    if "k_scale" in read:
        scores *= factor("k_scale")
    if few.softcap is not None:
        scores = few.softcap * jnp.tanh(scores * (few.scale / few.softcap))
    scores = jnp.where(there[None] if seen is None else there[None] & seen, scores, MASKED)
    now = jnp.maximum(top, jnp.max(scores, axis=1) * few.exponent)
    weights = exp2(scores, few.exponent, now[:, None], few.interpreted)
    shrink = exp2(top, 1.0, now, few.interpreted)
    total = total * shrink + jnp.sum(weights, axis=1)
    if "v_scale" in read:
        weights *= factor("v_scale")
    weights = weights.astype(q[0].dtype)
    sums = tuple(part * shrink[:, None] + dot(weights, v) for part, v in zip(sums, load("v"), strict=True))
    return now, total, sums


def _widened(x: jax.Array, dtype: Any) -> list[jax.Array]:
    """Numbers of slots in the queries' dtype; of bytes with two signed numbers of four bits, both, the lower first."""
    if x.dtype == dtype:
        return [x]
    if x.dtype != jnp.uint8:
        return [x.astype(jnp.float32).astype(dtype)]
    wide = x.astype(jnp.int32)
    numbers = (lax.shift_right_arithmetic(lax.shift_left(wide, jnp.int32(by)), jnp.int32(28)) for by in (28, 24))
    return [number.astype(jnp.float32).astype(dtype) for number in numbers]
