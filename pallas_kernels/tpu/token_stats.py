"""What a loss reads of each token's logits, and gradients through it, on TPUs: logits never leave the chip.

Hidden states of some thousand tokens, a *tile*, stay in the chip's memory while the output matrix passes once, a block
of the vocabulary at a time. Forwards a running maximum and sum give the log-sum-exps, as in flash attention. Backwards
the logits are made again; a tile's gradient grows in the chip's memory, and the matrix's is added to in place. The
vocabulary is cut in two shares, whose results are merged: for chips that have two cores, and at no cost on others.
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
from jaxtyping import Array, Float, Int32

from pallas_kernels.padding import padded
from pallas_kernels.tpu.tiles import LANES, NN, NT, TN, across, dot

PIECE = 512  # tokens of one product
TILE = 2048  # tokens at most that stay in the chip's memory
TILE_BYTES = 50 * 2**20  # for a tile, its gradient, and blocks of the matrix
MAX_BYTES = 16384  # of a token's hidden state
VMEM_BYTES = 63 * 2**20
NOTHING = -1e30


def token_stats(
    x: Float[Array, "N E"], w: Float[Array, "V E"] | Float[Array, "E V"], targets: Int32[Array, " N"], **settings: Any
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """`pallas_kernels.api.token_stats` on a TPU: the targets' logits, log-sum-exps, and mean logits."""
    call = _Call.make(x, w, backward=False, **settings)
    width, tiles = x.shape[1], -(-x.shape[0] // call.tile)
    column = pl.BlockSpec((None, call.tile, 1), lambda s, i, j: (s, i, 0))
    logit, lse, mean = pl.pallas_call(
        partial(_forward, call),
        grid=(call.shares, tiles, call.steps),
        in_specs=[
            pl.BlockSpec((call.tile, width), lambda s, i, j: (i, 0)),
            call.matrix(width, lambda s, i, j: call.place(s, j)),
            pl.BlockSpec((call.tile, 1), lambda s, i, j: (i, 0)),
        ],
        out_specs=[column] * 3,
        out_shape=[jax.ShapeDtypeStruct((call.shares, tiles * call.tile, 1), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((call.tile, LANES), jnp.float32)] * 4,
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        interpret=call.interpret,
        name="token_stats_forward",
    )(padded(x, 0, call.tile), w, padded(targets, 0, call.tile)[:, None])
    merged = jnp.sum(logit, axis=0), jax.nn.logsumexp(lse, axis=0), jnp.sum(mean, axis=0)
    logit, lse, mean = (column[: x.shape[0], 0] for column in merged)
    return logit, lse, mean


def token_stats_gradients(
    x: Float[Array, "N E"],
    w: Float[Array, "V E"] | Float[Array, "E V"],
    targets: Int32[Array, " N"],
    lse: Float[Array, " N"],
    slopes: tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]],
    d_w: Array | None,
    **settings: Any,
) -> tuple[Float[Array, "N E"], Array | None]:
    """`pallas_kernels.api.token_stats_gradients` on a TPU; slopes of the targets' logits, of `lse`, and of the mean."""
    call = _Call.make(x, w, backward=True, **settings)
    d_logit, d_lse, d_mean = slopes
    even = d_mean / call.vocabulary
    numbers = jnp.stack((lse, d_lse, d_logit + even, even), axis=1)
    whole = [padded(a, 0, call.tile) for a in (x, numbers, targets[:, None])]
    cut = [a.reshape(-1, call.tile, *a.shape[1:]) for a in whole]
    if cut[0].shape[0] == 1:
        d_x, d_w = _tile_gradients(call, w, (cut[0][0], cut[1][0], cut[2][0]), d_w)
    else:

        def tile(d_w: Array | None, operands: Any) -> tuple[Array | None, Array]:
            d_x, d_w = _tile_gradients(call, w, operands, d_w)
            return d_w, d_x

        d_w, d_x = lax.scan(tile, d_w, tuple(cut))
    return d_x.reshape(-1, x.shape[1])[: x.shape[0]], d_w


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static. by_rows: a row of the matrix is a token of the vocabulary, else a column."""

    by_rows: bool
    vocabulary: int
    softcap: float | None
    tile: int
    block: int
    interpret: Any

    @classmethod
    def make(
        cls, x: Array, w: Array, *, backward: bool, vocab_axis: int, softcap: float | None, block: int | None,
        interpret: Any,
    ) -> _Call:  # fmt: skip
        tokens, width = x.shape
        tile, default = sizes(tokens, width, w.shape[vocab_axis], x.dtype.itemsize, backward)
        return cls(vocab_axis == 0, w.shape[vocab_axis], softcap, tile, block or default, interpret)

    @property
    def blocks(self) -> int:
        return -(-self.vocabulary // self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block is not whole: behind the vocabulary anything may stand."""
        return self.vocabulary % self.block != 0

    @property
    def shares(self) -> int:
        return min(2, self.blocks)

    @property
    def steps(self) -> int:
        """Blocks of a share; of the last share the last ones may not be there."""
        return -(-self.blocks // self.shares)

    def place(self, share: Any, j: Any) -> Any:
        """Which block of the vocabulary is read in step j of a share; of those that are not there, the last again."""
        return jnp.minimum(share * self.steps + j, self.blocks - 1)

    def matrix(self, width: int, place: Any) -> pl.BlockSpec:
        """Blocks of the output matrix; `place` says which, by the grid's indices."""
        if self.by_rows:
            return pl.BlockSpec((self.block, width), lambda *at: (place(*at), 0))
        return pl.BlockSpec((width, self.block), lambda *at: (0, place(*at)))

    def inside(self, j: Any, shape: tuple[int, ...], axis: int) -> Any:
        """Where block j of the vocabulary holds any of it."""
        return lax.broadcasted_iota(jnp.int32, shape, axis) < self.vocabulary - j * self.block

    def logits(self, x: Array, w: Any) -> Array:
        found = dot(x, w[...], NT if self.by_rows else NN)
        return found if self.softcap is None else self.softcap * jnp.tanh(found * (1.0 / self.softcap))


def sizes(tokens: int, width: int, vocabulary: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Tokens of a tile, and of a block of the vocabulary.

    A large tile reads the matrix seldom; a block is narrower where its gradients, in float32 and twice for what is on
    its way, would leave no room for a tile.

    Raises:
      ValueError: a token is so wide that no tile fits.
    """
    if width * itemsize > MAX_BYTES:
        most = MAX_BYTES // itemsize
        raise ValueError(f"width {width}: the TPU kernel for losses takes {most} at most; use streamjax's XLA path")
    block = 512 if width <= 2048 else 256 if width <= 4096 else 128
    token_bytes, entry_bytes = (itemsize + 4, 2 * itemsize + 16) if backward else (2 * itemsize, 2 * itemsize)
    room = TILE_BYTES - block * width * (entry_bytes + itemsize)
    most = max(PIECE, min(TILE, room // (token_bytes * width) // PIECE * PIECE))
    tiles = -(-tokens // most)
    tile = -(-tokens // (tiles * PIECE)) * PIECE
    return tile, min(block, -(-vocabulary // LANES) * LANES)


def _pieces(tile: int, work: Any) -> None:
    lax.fori_loop(0, tile // PIECE, lambda i, _: work(pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE)), None)


def _forward(
    call: _Call, x: Any, w: Any, targets: Any, logit: Any, lse: Any, mean: Any, top: Any, total: Any, chosen: Any,
    sums: Any,
) -> None:  # fmt: skip
    step = pl.program_id(2)
    j = pl.program_id(0) * call.steps + step

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, NOTHING)
        for ref in (total, chosen, sums):
            ref[...] = jnp.zeros_like(ref)

    def piece(at: Any) -> None:
        logits = counted = call.logits(x[at], w)
        if call.ragged:
            inside = call.inside(j, logits.shape, 1)
            counted, logits = jnp.where(inside, logits, 0.0), jnp.where(inside, logits, NOTHING)
        now = jnp.maximum(top[at], jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - across(now, call.block))
        total[at] = total[at] * jnp.exp(top[at] - now) + jnp.sum(weights, axis=1, keepdims=True)
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[at] - j * call.block
        chosen[at] += jnp.sum(jnp.where(hit, counted, 0.0), axis=1, keepdims=True)
        sums[at] += jnp.sum(counted, axis=1, keepdims=True)
        top[at] = now

    pl.when(j < call.blocks)(lambda: _pieces(call.tile, piece))

    @pl.when(step == call.steps - 1)
    def _() -> None:
        logit[...] = chosen[:, :1]
        lse[...] = (top[...] + jnp.log(total[...]))[:, :1]
        mean[...] = sums[:, :1] * (1.0 / call.vocabulary)


def _tile_gradients(
    call: _Call,
    w: Array,
    operands: tuple[Float[Array, "tile E"], Float[Array, "tile 4"], Int32[Array, "tile 1"]],
    d_w: Array | None,
) -> tuple[Float[Array, "tile E"], Array | None]:
    """Of one tile: float32 gradient of its hidden states, and `d_w` with what it adds, if that is wanted.

    operands: hidden states; log-sum-exps, slopes of these, of a target's logit and of any other logit; targets.
    """
    x, width = operands[0], operands[0].shape[1]

    def whole(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda s, j: (0, 0), pipeline_mode=pl.Buffered(1))

    matrix = call.matrix(width, call.place)
    reads, in_specs = [w, *operands], [matrix, *map(whole, operands)]
    out_specs = [pl.BlockSpec((None, *x.shape), lambda s, j: (s, 0, 0), pipeline_mode=pl.Buffered(1))]
    out_shape = [jax.ShapeDtypeStruct((call.shares, *x.shape), jnp.float32)]
    block = (call.block, width) if call.by_rows else (width, call.block)
    scratch = {"w": pltpu.VMEM(block, w.dtype)} if call.ragged else {}
    if d_w is not None:
        if call.interpret:  # JAX's interpreter returns whole blocks of what was given as an operand, against its shape
            d_w = padded(d_w, 0 if call.by_rows else 1, call.block)
        reads, in_specs, out_specs = [*reads, d_w], [*in_specs, matrix], [*out_specs, matrix]
        out_shape.append(jax.ShapeDtypeStruct(d_w.shape, d_w.dtype))
        if d_w.dtype != jnp.float32:
            scratch["d_w"] = pltpu.VMEM(block, jnp.float32)
    found = pl.pallas_call(
        partial(_backward, call, d_w is not None),
        grid=(call.shares, call.steps),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        input_output_aliases={} if d_w is None else {4: 1},
        compiler_params=_parameters("parallel", "arbitrary"),
        interpret=call.interpret,
        name="token_stats_backward",
    )(*reads)
    return jnp.sum(found[0], axis=0), None if d_w is None else found[1][: w.shape[0], : w.shape[1]]


def _backward(call: _Call, trained: bool, w: Any, x: Any, numbers: Any, targets: Any, *refs: Any) -> None:
    before, d_x, d_w, scratch = refs if trained else (None, refs[0], None, refs[1])
    step = pl.program_id(1)
    j = pl.program_id(0) * call.steps + step
    sums, whole = scratch.get("d_w", d_w), scratch.get("w", w)

    @pl.when(step == 0)
    def _() -> None:
        d_x[...] = jnp.zeros_like(d_x)

    def piece(at: Any) -> None:
        mine, known = x[at], numbers[at]
        lse, d_lse, d_hit, d_other = (known[:, i : i + 1] for i in range(4))
        logits = call.logits(mine, whole)
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[at] - j * call.block
        slope = jnp.exp(logits - lse) * d_lse + jnp.where(hit, d_hit, d_other)
        if call.softcap is not None:
            slope *= 1.0 - jnp.square(logits * (1.0 / call.softcap))
        if call.ragged:
            slope = jnp.where(call.inside(j, slope.shape, 1), slope, 0.0)
        slope = slope.astype(mine.dtype)
        d_x[at] += dot(slope, whole[...], NN if call.by_rows else NT)
        if trained:
            sums[...] += dot(*((slope, mine) if call.by_rows else (mine, slope)), TN)

    @pl.when(j < call.blocks)
    def _() -> None:
        if trained:
            sums[...] = before[...].astype(sums.dtype)
        if call.ragged:  # zeros behind the vocabulary, where a product with 0 need not be 0
            whole[...] = jnp.where(call.inside(j, w.shape, 0 if call.by_rows else 1), w[...], 0)
        _pieces(call.tile, piece)
        if sums is not d_w:
            d_w[...] = sums[...].astype(d_w.dtype)


def _parameters(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
