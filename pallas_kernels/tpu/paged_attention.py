"""Decoding over chosen pages on TPUs: a few queries against the pages of a long cache that each key head names.

Which pages is data: their numbers are prefetched as scalars. A page is small (64 tokens of 128 channels are 16 KB), so
several are fetched for one step and worked on as one, by copies that the kernel starts itself: a grid's own pipeline
spends more on each page's bookkeeping than the arithmetic takes. While a step is worked on, the next one's pages are on
their way, those of the next head behind a head's last step.

Pages of a pool belong to no row: a table says which are a row's, in their order, for all of its key heads. Where a
token stands in its stream then follows from its place in the table.

Of pages in codes the kernel fetches the codes. What these stand for is little, less than a tile for a page: XLA gathers
it for the pages that are named, and a head's lies in fast memory.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.coded import Coded
from pallas_kernels.partial import Partial
from pallas_kernels.tpu.slots import codes, online_softmax
from pallas_kernels.tpu.tiles import LANES, SUBLANES
from pallas_kernels.unpacking.protocol import Unpackable

TOGETHER = 1024  # slots that are worked on at once
NOWHERE = -(2**30)  # slots before a ring


@dataclasses.dataclass(frozen=True)
class _Static:
    """scale, softcap: of the logits. slots: of the ring. size: of a page. together: pages of a step. steps: of a head.
    key_heads: of a row. chain: heads that one core works on in turns. k, v: how codes lie; None where none do. pooled:
    whether pages are a pool's, and tables the rows'. readers: whether each page has readers of its own."""

    scale: float
    softcap: float | None
    slots: int
    size: int
    together: int
    steps: int
    key_heads: int
    chain: int
    k: codes.Lying | None = None
    v: codes.Lying | None = None
    pooled: bool = False
    readers: bool = False

    @property
    def bounds(self) -> int:
        """Columns in which `_readers` makes its mask: one page, or as many as fill the lanes."""
        width = self.together * self.size
        if self.size % LANES == 0 or LANES % self.size == 0:
            width = max(self.size, min(LANES, width))
        return width

    def row(self, head: Any) -> Any:
        """Whose table a head reads, and which tokens: the row's."""
        return lax.div(head, jnp.int32(self.key_heads))

    def table(self, head: Any) -> Any:
        """Which table names a head's pages."""
        return self.row(head) if self.pooled else head

    def buffer(self, head: Any) -> Any:
        """Which of the buffers holds them."""
        return lax.rem(head, jnp.int32(self.key_heads)) if self.pooled else head


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"] | Coded | Unpackable,
    v: Float[Array, "B K S D"] | Coded | Unpackable,
    pages: Int32[Array, "B K N"],
    count: Int32[Array, " B"],
    *,
    page_size: int,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    softcap: float | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.paged_attention` on a TPU; see there for the arguments. block: slots of one step.

    Raises:
      ValueError: codes that a codec unpacks itself: their slots lie along lanes, of which a page is no whole tile.
    """
    if isinstance(k, Unpackable) or isinstance(v, Unpackable):
        raise ValueError("pages of codes that lie with slots behind: TPUs do not take them")
    key_heads, slots = k.shape[1:3]
    together, steps = _steps(block, page_size, pages.shape[2])
    lying: tuple[Any, Any] = codes.lying(k, v) if isinstance(k, Coded) and isinstance(v, Coded) else (None, None)
    static = _Static(scale, softcap, slots, page_size, together, steps, key_heads, _chain(len(q), key_heads), *lying)
    table = _filled(pages, steps * together, slots // page_size)
    named = jnp.sum(pages >= 0, axis=-1, dtype=jnp.int32)
    held = jnp.stack([count, jnp.zeros_like(count) if first is None else first]).astype(jnp.int32)
    numbers: dict[str, Array] = {}
    if isinstance(k, Coded) and isinstance(v, Coded):
        numbers = _gathered(k, v, table, page_size, steps)
    held_as = [x.codes if isinstance(x, Coded) else x for x in (k, v)]
    cache = [x.reshape(len(q) * key_heads, slots // page_size, -1, x.shape[3]) for x in held_as]
    return _run_kernel(static, held, table, named, q, cache, numbers, interpret)


def pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, "B N"],
    count: Int32[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.pool_attention` on a TPU; see there for the arguments. block: slots of one step."""
    key_heads, last, size, _ = k.shape
    together, steps = _steps(block, size, pages.shape[1])
    chain = _chain(len(q), key_heads)
    static = _Static(scale, softcap, last * size, size, together, steps, key_heads, chain, pooled=True)
    count = jnp.minimum(count, pages.shape[1] * size).astype(jnp.int32)
    held = jnp.stack([count, jnp.zeros_like(count)])
    table, named = _filled(pages, steps * together, last), (count + size - 1) // size
    return _run_kernel(static, held, table, named, q, [k, v], {}, interpret)


def shared_pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, " M"],
    readers: Int32[Array, " M"],
    count: Int32[Array, ""],
    *,
    scale: float,
    softcap: float | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.shared_pool_attention` on a TPU; see there for the arguments.

    All rows are one, whose queries are masked: bit b of a page's `readers` says whether row b has it. `count`: pages.
    """
    key_heads, last, size, _ = k.shape
    together, steps = _steps(block, size, len(pages))
    static = _Static(
        scale, softcap, last * size, size, together, steps, key_heads, _chain(1, key_heads), pooled=True, readers=True
    )
    held = jnp.stack([count * size, jnp.zeros_like(count)])[:, None].astype(jnp.int32)
    table = _filled(pages[None], steps * together, last)
    padded = jnp.pad(readers, (0, steps * together - len(readers)))
    one = q.reshape(1, -1, *q.shape[2:])
    rows = online_softmax.grouped(one, key_heads).shape[2]
    whose = jnp.arange(rows, dtype=jnp.int32) % one.shape[1] // q.shape[1]
    numbers = {"whose": jnp.broadcast_to(whose[None, :, None], (key_heads, rows, static.bounds))}
    part = _run_kernel(static, held, table, count[None].astype(jnp.int32), one, [k, v], numbers, interpret, padded)
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:3]))


def _steps(block: int | None, page_size: int, pages: int) -> tuple[int, int]:
    """Pages of a step, and steps."""
    together = max(1, min((block or TOGETHER) // page_size, pages))
    return together, -(-pages // together)


def _chain(batch: int, key_heads: int) -> int:
    """Heads that one core works on in turns: shares for a chip's two cores."""
    return key_heads if batch % 2 == 0 or key_heads % 2 else key_heads // 2


def _filled(pages: Int32[Array, "*tables N"], width: int, count: int) -> Int32[Array, "*tables _"]:
    """Tables of one width. In the place of none stands the first page: what lies anywhere else might not be numbers."""
    table = jnp.pad(pages, [*[(0, 0)] * (pages.ndim - 1), (0, width - pages.shape[-1])], constant_values=-1)
    return jnp.where(table < 0, jnp.maximum(pages[..., :1], 0), jnp.minimum(table, count - 1)).astype(jnp.int32)


def _run_kernel(
    static: _Static,
    held: Int32[Array, "2 B"],
    table: Int32[Array, "*tables N"],
    named: Int32[Array, "*tables"],
    q: Float[Array, "B C H D"],
    cache: list[Array],
    numbers: dict[str, Array],
    interpret: Any,
    readers: Int32[Array, " N"] | None = None,
) -> Partial:
    """The kernel over pages that lie as [buffers, pages, rows, D]."""
    scalars = [held, table.reshape(-1), named.reshape(-1), *([] if readers is None else [readers])]
    key_heads, together, chain, width = static.key_heads, static.together, static.chain, q.shape[3]
    batch = len(q)
    heads = batch * key_heads
    grouped = online_softmax.grouped(q, key_heads)
    rows = grouped.shape[2]

    def whole(columns: int) -> Any:
        return pl.BlockSpec((None, rows, columns), lambda i, j, *_: (i * chain + j, 0, 0))

    own = [
        pl.BlockSpec((None, *x.shape[1:]), lambda i, j, *_, n=x.ndim: (i * chain + j, *[0] * (n - 1)))
        for x in numbers.values()
    ]
    pools = [pltpu.VMEM((2, together, *x.shape[2:]), x.dtype) for x in cache]
    copies = [*pools, pltpu.SemaphoreType.DMA((2, 2)), pltpu.SMEM((1,), jnp.int32)]
    out, lse = pl.pallas_call(
        partial(_kernel, static, list(numbers)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(heads // chain, chain),
            in_specs=[whole(width), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY), *own],
            out_specs=[whole(width), whole(LANES)],
            scratch_shapes=[*online_softmax.scratch(rows, width), *copies],
        ),
        out_shape=[jax.ShapeDtypeStruct((heads, rows, columns), jnp.float32) for columns in (width, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # the table names pages of the cache alone
        ),
        interpret=interpret,
        name=("shared_pool" if static.readers else "pool" if static.pooled else "paged") + "_attention",
    )(
        *scalars, grouped.reshape(heads, rows, width), *cache, *numbers.values(),
    )  # fmt: skip
    out, lse = (x.reshape(batch, key_heads, rows, -1) for x in (out, lse))
    return online_softmax.ungrouped(out, lse, q)


def _gathered(
    k: Coded, v: Coded, table: Int32[Array, "B K N"], size: int, steps: int
) -> dict[str, Shaped[Array, "heads steps _ _"]]:
    """What the codes of the pages in a table stand for, in 32 bits; numbers along tokens with slots behind."""

    def of_pages(x: Array) -> Array:
        pages = x.reshape(*x.shape[:2], k.shape[2] // size, -1, x.shape[3])
        some = jnp.take_along_axis(pages, table[..., None, None], axis=2, mode="clip")
        some = some.astype(jnp.int32 if some.dtype == jnp.uint8 else jnp.float32)
        return some.reshape(table.shape[0] * table.shape[1], steps, -1, x.shape[3])

    found = {}
    for of, x in (("k", k), ("v", v)):
        for name, (array, along) in x.numbers.items():
            some = of_pages(array)
            found[f"{of}_{name}"] = some if along == "channel" else jnp.swapaxes(some, 2, 3)
    return found


def _kernel(static: _Static, names: list[str], *refs: Any) -> None:
    held_ref, table_ref, named_ref, *rest = refs
    readers_ref = rest.pop(0) if static.readers else None
    q_ref, k_ref, v_ref = rest[:3]
    numbers = dict(zip(names, rest[3:], strict=False))
    whose = numbers.pop("whose", None)
    out, lse, top, total, sums, k_pool, v_pool, signals, turn = rest[3 + len(names) :]
    j = pl.program_id(1)
    head = pl.program_id(0) * static.chain + j
    state, each = (top, total, sums), static.steps * static.together
    row, named = static.row(head), named_ref[static.table(head)]
    steps = jnp.maximum(lax.div(named + static.together - 1, jnp.int32(static.together)), 1)
    both = ((k_ref, k_pool), (v_ref, v_pool))

    def fetch(head: Any, at: Any, into: Any) -> None:
        """Start the copies of a step's pages, whose numbers stand in the table from `at` on."""
        for number, (ref, pool) in enumerate(both):
            for i in range(static.together):
                page = ref.at[static.buffer(head), table_ref[at + i]]
                pltpu.make_async_copy(page, pool.at[into, i], signals.at[number, into]).start()

    def arrived(into: Any) -> None:
        """Wait for a step's copies: the bytes of all of them are counted together."""
        for number, (_, pool) in enumerate(both):
            pltpu.make_async_copy(pool.at[into], pool.at[into], signals.at[number, into]).wait()

    @pl.when(j == 0)
    def begin() -> None:
        turn[0] = 0
        fetch(head, static.table(head) * each, 0)

    online_softmax.clear(state)

    def step(n: Any, carry: None) -> None:
        now = turn[0]
        turn[0] = 1 - now
        more = n + 1 < steps

        @pl.when(more | (j + 1 < static.chain))
        def prefetch() -> None:
            at = static.table(head) * each + (n + 1) * static.together
            at = jnp.where(more, at, static.table(head + 1) * each)
            fetch(jnp.where(more, head, head + 1), at, 1 - now)

        arrived(now)

        @pl.when(named > 0)
        def work() -> None:
            k, v = (pool[now].reshape(-1, pool.shape[-1]) for _, pool in both)
            block = {"q": q_ref[...], "k": k, "v": v, **{name: ref[n] for name, ref in numbers.items()}}
            if static.k is not None and static.v is not None:
                codes.widen(static.k, static.v, block)
            if static.pooled:
                shape = (SUBLANES, static.together * static.size)
                age = lax.broadcasted_iota(jnp.int32, shape, 1) + n * static.together * static.size
            else:
                here = _index(static, table_ref, head * each + n * static.together, named - n * static.together)
                age = jnp.where(here < 0, static.slots, online_softmax.age(here, held_ref[1, row], static.slots))
            seen = jnp.broadcast_to(age[:1], (q_ref.shape[0], age.shape[1])) < held_ref[0, row]
            if static.readers:
                seen &= _readers(static, readers_ref, n * static.together, whose[...])
            online_softmax.add(static.scale, static.softcap, block, seen, state)

    lax.fori_loop(0, steps, step, None)
    online_softmax.finish(static.scale, static.softcap, state, out, lse)


def _index(static: _Static, table_ref: Any, at: Any, named: Any) -> jax.Array:
    """Slots of a step's columns in the ring, in every sublane; below 0 behind the first `named` pages."""
    width = static.bounds  # what is made for each piece alone stays in one register
    column = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)
    parts = []
    for low in range(0, static.together, each := width // static.size):
        pages = range(low, min(low + each, static.together))
        begins = [jnp.where(i < named, (table_ref[at + i] - i + low) * static.size, NOWHERE) for i in pages]
        begin = jnp.full_like(column, begins[0])
        for i, other in enumerate(begins[1:], 1):
            begin = jnp.where(column >= i * static.size, other, begin)
        parts.append((column + begin)[:, : len(pages) * static.size])
    return jnp.concatenate(parts, axis=1)


def _readers(static: _Static, readers_ref: Any, at: Any, whose: jax.Array) -> jax.Array:
    """Which rows of queries have the pages of a step: [rows, slots]."""
    column = lax.broadcasted_iota(jnp.int32, whose.shape, 1)
    parts = []
    for low in range(0, static.together, each := static.bounds // static.size):
        count = min(each, static.together - low)
        bits = jnp.full_like(column, readers_ref[at + low])
        for i in range(1, count):
            bits = jnp.where(column >= i * static.size, readers_ref[at + low + i], bits)
        parts.append((lax.shift_right_logical(bits, whose) & 1)[:, : count * static.size])
    return jnp.concatenate(parts, axis=1) > 0
