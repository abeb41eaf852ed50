"""FlashAttention forwards for Hopper GPUs, in Mosaic GPU: output and log-sum-exp, of causal patterns.

A program has three warpgroups (FlashAttention-3, 2407.08608). The producer copies blocks of keys and values by TMA into
a ring of buffers, as barriers tell it that one is free. Two consumers hold 64 or 128 queries each, multiply them by the
blocks that their own queries see (wgmma, sums in registers) and pass over the others. They take turns: while one has
the tensor cores, the other makes its softmax. Whole blocks are not masked; sinks behind the window come first, as
blocks of 64 keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.gpu.exponentials import MASKED
from pallas_kernels.gpu.flash_operands import dot, over_keys
from pallas_kernels.tile_logits import LOG2E, Settings, sink_visible, tile_mask

plgpu: Any = mosaic_gpu  # 0.11.2's or newer; with an older one, which lacks some of it, nobody comes here

CONSUMERS = 2
SINK_BLOCK = 64  # keys: as many as a product of bfloat16 in swizzled memory sums at least
SHARED_BYTES = 227 * 1024 - 4096  # for operands; barriers and what reductions use are beside them
MOST_STAGES = 4


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static in the kernel: settings; ranges of a program's queries, those of all consumers; how many buffers
    the ring has."""

    settings: Settings
    ranges: Ranges
    stages: int

    @property
    def consumer(self) -> Ranges:
        """Ranges of one consumer's queries."""
        return dataclasses.replace(self.ranges, block_q=self.ranges.block_q // CONSUMERS)

    @property
    def sink_blocks(self) -> int:
        return 0 if self.settings.window is None else -(-self.settings.sinks // SINK_BLOCK)


def stages(width: int, block_q: int, block_k: int) -> int:
    """Buffers of keys and values that fit beside a tile of queries, `MOST_STAGES` at most."""
    return min((SHARED_BYTES - 2 * block_q * width) // (4 * block_k * width), MOST_STAGES)


def forward(
    settings: Settings, ranges: Ranges, offset: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Output, float32 [B, T, H, D], and log-sum-exp, float32 [B, H, T]; 0 and -inf where nothing is seen.

    q [B, T, H, D], k, v [B, S, K, D] of bfloat16, T and S padded to whole blocks; offset [1]; `interpret` is False or
    parameters of the interpreter.
    """
    batch, length, heads, width = q.shape
    form = Form(settings, ranges, stages(width, ranges.block_q, ranges.block_k))
    rows = ranges.block_q // CONSUMERS
    ring = form.stages, ranges.block_k, width
    filled = plgpu.Barrier(num_barriers=form.stages)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=form.stages)
    call = plgpu.kernel(
        partial(_kernel, form),
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch_types={
            "q_tiles": plgpu.SMEM((CONSUMERS, rows, width), q.dtype),
            "k_ring": plgpu.SMEM(ring, k.dtype),
            "v_ring": plgpu.SMEM(ring, v.dtype),
            "q_filled": plgpu.Barrier(num_barriers=CONSUMERS),
            "k_filled": filled,
            "v_filled": filled,
            "k_free": free,
            "v_free": free,
            "turns": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        grid=(batch, heads, ranges.blocks),  # the last runs fastest: neighbours read the same keys
        grid_names=("batch", "heads", "tiles"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="flash_forward_hopper",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )
    out, lse = call(offset, q, k, v)
    return out, lse


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory and barriers. Filled and free are of each buffer of the ring, `turns` of the tensor cores."""

    q_tiles: Any
    k_ring: Any
    v_ring: Any
    q_filled: Any
    k_filled: Any
    v_filled: Any
    k_free: Any
    v_free: Any
    turns: Any


@dataclasses.dataclass(frozen=True)
class _Steps:
    """A program's way through its blocks: `sinks` blocks of sinks, then blocks of keys from `low` to `high` - 1."""

    sinks: Any
    low: Any
    high: Any

    def of_block(self, j: Any) -> Any:
        """The step that works on block j of the keys."""
        return self.sinks + j - self.low


def _kernel(form: Form, offset_ref: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **scratch: Any) -> None:
    at, warpgroup, offset = _Scratch(**scratch), lax.axis_index("warpgroup"), offset_ref[0]
    # Under a causal pattern the last tiles of queries have most to do: they start first.
    tile = form.ranges.blocks - 1 - lax.axis_index("tiles")
    low, high = form.ranges.range(tile, offset)
    steps = _Steps(_sink_steps(form, form.ranges, tile, offset), low, high)
    place = lax.axis_index("batch"), lax.axis_index("heads")

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _produce(form, steps, (k, v), place, at)

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _consume(form, steps, (q, out, lse), place, at, warpgroup, tile * CONSUMERS + warpgroup, offset)


def _sink_steps(form: Form, ranges: Ranges, i: Any, offset: Any) -> Any:
    """Blocks of sinks that block i of queries sees behind its window."""
    if not form.sink_blocks:
        return jnp.int32(0)
    assert ranges.window is not None
    late = offset + (i + 1) * ranges.block_q > ranges.window
    return jnp.where(late, jnp.int32(form.sink_blocks), jnp.int32(0))


def _produce(form: Form, steps: _Steps, keys: tuple[Any, Any], place: tuple[Any, Any], at: _Scratch) -> None:
    """Copies the blocks of keys and values into the ring, each as soon as both consumers have left its buffer."""
    batch, head = place
    head = lax.div(head, jnp.int32(form.settings.group))

    def fill(step: Any, first: Any, size: int) -> None:
        slot = lax.rem(step, jnp.int32(form.stages))
        operands = (keys[0], at.k_ring, at.k_filled, at.k_free), (keys[1], at.v_ring, at.v_filled, at.v_free)
        for source, ring, filled, free in operands:

            @pl.when(step >= form.stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            buffer = ring.at[slot] if size == form.ranges.block_k else ring.at[slot, pl.ds(0, size)]
            plgpu.copy_gmem_to_smem(source.at[batch, pl.ds(first, size), head], buffer, filled.at[slot])

    def sinks(j: Any, carry: None) -> None:
        fill(j, j * SINK_BLOCK, SINK_BLOCK)

    def blocks(j: Any, carry: None) -> None:
        fill(steps.of_block(j), j * form.ranges.block_k, form.ranges.block_k)

    if form.sink_blocks:
        lax.fori_loop(jnp.int32(0), steps.sinks, sinks, None)
    lax.fori_loop(steps.low, steps.high, blocks, None)


def _consume(
    form: Form,
    steps: _Steps,
    rows: tuple[Any, Any, Any],
    place: tuple[Any, Any],
    at: _Scratch,
    consumer: Any,
    i: Any,
    offset: Any,
) -> None:
    """Attention of block i of one consumer's queries."""
    settings, ranges, (q, out, lse), (batch, head) = form.settings, form.consumer, rows, place
    here, query = pl.ds(i * ranges.block_q, ranges.block_q), offset + i * ranges.block_q
    q_tile = at.q_tiles.at[consumer]
    plgpu.copy_gmem_to_smem(q.at[batch, here, head], q_tile, at.q_filled.at[consumer])
    plgpu.barrier_wait(at.q_filled.at[consumer])

    def take_turn() -> None:
        plgpu.barrier_arrive(at.turns)
        plgpu.barrier_wait(at.turns)

    def add(mask: Callable[..., Any] | None, step: Any, key: Any, size: int, carry: Any) -> Any:
        """The state of the softmax with the keys of one step, the first of which is `key`."""
        top, total, sums = carry
        slot = lax.rem(step, jnp.int32(form.stages))
        k, v = (x.at[slot] if size == ranges.block_k else x.at[slot, pl.ds(0, size)] for x in (at.k_ring, at.v_ring))
        plgpu.barrier_wait(at.k_filled.at[slot])

        def products(sums_ref: Any) -> jax.Array:
            plgpu.wgmma(sums_ref, q_tile, k.T)
            take_turn()  # the other consumer has the tensor cores as soon as these products are done
            return sums_ref[...]

        scores = pl.run_scoped(products, plgpu.ACC((ranges.block_q, size), jnp.float32))
        plgpu.barrier_arrive(at.k_free.at[slot])
        if settings.softcap is not None:
            scores = _capped(scores, settings.scale, settings.softcap)
        if mask is not None:
            scores = jnp.where(mask(settings, scores.shape, query, key), scores, MASKED)
        now = jnp.maximum(top, jnp.max(scores, axis=1) * settings.exact)
        weights = jnp.exp2(scores * settings.exact - now[:, None])
        shrink = jnp.exp2(top - now)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums, weights = sums * shrink[:, None], weights.astype(q.dtype)
        # All of it belongs to this turn: nothing may move behind the next one's start.
        now, total, sums, weights = lax.optimization_barrier((now, total, sums, weights))
        plgpu.barrier_arrive(at.turns)
        plgpu.barrier_wait(at.v_filled.at[slot])
        plgpu.barrier_wait(at.turns)
        sums = _plus_product(form, sums, weights, v)
        plgpu.barrier_arrive(at.v_free.at[slot])
        return now, total, sums

    def keys(masked: bool, j: Any, carry: Any) -> Any:
        return add(tile_mask if masked else None, steps.of_block(j), j * ranges.block_k, ranges.block_k, carry)

    def sinks(j: Any, carry: Any) -> Any:
        return add(sink_visible, j, j * SINK_BLOCK, SINK_BLOCK, carry)

    def leave(step: Any, carry: None) -> None:
        """A block that only the other consumer sees. Waiting keeps this one's phase of the barriers."""
        slot = lax.rem(step, jnp.int32(form.stages))
        take_turn()
        plgpu.barrier_wait(at.k_filled.at[slot])
        plgpu.barrier_arrive(at.k_free.at[slot])
        plgpu.barrier_wait(at.v_filled.at[slot])
        plgpu.barrier_arrive(at.v_free.at[slot])
        take_turn()

    carry = (
        jnp.full(ranges.block_q, MASKED * settings.exact, jnp.float32),
        jnp.zeros(ranges.block_q, jnp.float32),
        jnp.zeros((ranges.block_q, q.shape[-1]), jnp.float32),
    )
    low, high = ranges.range(i, offset)
    pl.when(consumer == 1)(take_turn)  # the consumers are one turn apart
    if form.sink_blocks:
        mine = _sink_steps(form, ranges, i, offset)
        carry = lax.fori_loop(jnp.int32(0), mine, sinks, carry)
        lax.fori_loop(mine, steps.sinks, leave, None)
    lax.fori_loop(steps.of_block(steps.low), steps.of_block(low), leave, None)
    top, total, sums = over_keys(settings, ranges, i, offset, keys, carry)
    lax.fori_loop(steps.of_block(high), steps.of_block(steps.high), leave, None)
    pl.when(consumer == 0)(take_turn)

    some = top > 0.5 * MASKED * settings.exact
    divisor = jnp.where(some, total, 1.0)
    factor = jnp.where(some, 1.0 / divisor, 0.0)
    out[batch, here, head] = sums * factor[:, None]
    lse[batch, head, here] = jnp.where(some, top / LOG2E + jnp.log(divisor), -jnp.inf)


def _plus_product(form: Form, sums: jax.Array, weights: jax.Array, v: Any) -> jax.Array:
    """`sums + weights @ v`, on a GPU in place.

    The interpreter has neither products of what lies in registers nor sums that hold something before the product.
    """
    if form.settings.interpreted:
        found = sums + dot(weights, v[...])
        plgpu.commit_smem()  # a read by hand, which the next copy has to wait for
        return found
    return pl.run_state(lambda sums_ref: plgpu.wgmma(sums_ref, weights, v))(plgpu.ACC.init(sums))


def _capped(x: jax.Array, scale: float, cap: float) -> jax.Array:
    """`cap * tanh(x * scale / cap)`, by exponentials: a GPU's own tanh is right to three digits only."""
    return cap - 2.0 * cap / (jnp.exp2(x * (2.0 * LOG2E * scale / cap)) + 1.0)
