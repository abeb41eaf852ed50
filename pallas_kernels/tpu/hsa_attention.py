"""Attention inside chosen pages on TPUs as one differentiable function: many tokens at a time, `hsa_kernels.py`."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.choice_tiles import Tiles, most_tiles, tiles
from pallas_kernels.flash_call import no_gradient
from pallas_kernels.tpu import hsa_kernels
from pallas_kernels.tpu.hsa_kernels import TOGETHER, Work
from pallas_kernels.tpu.tiles import LANES, SUBLANES

RESIDENT = 16384  # rows of up to 128 channels of q that stay in the chip's memory: 8 MiB, and as much for each result
TABLE = 2**17  # tiles whose pages' numbers are prefetched: half of the chip's memory of scalars
LEAST, MOST = 128, 1024  # rows of a tile


@dataclasses.dataclass(frozen=True)
class _Static:
    """group, slab: query heads of a key head, and with what is added to fill vectors. span: queries that stay in fast
    memory. block: pairs of a tile. shape: of q."""

    scale: float
    group: int
    slab: int
    span: int
    block: int
    shape: tuple[int, ...]
    interpret: Any

    @property
    def key_heads(self) -> int:
        return self.shape[2] // self.group

    def slabs(self, x: Float[Array, "B C H D"]) -> Float[Array, "spans heads span_and_1 slab D"]:
        """What is resident for each span: queries of a key head, and one for pairs that are none."""
        x = rearrange(x.astype(jnp.float32), "b c (k g) d -> b c k g d", g=self.group)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.span), (0, 0), (0, self.slab - self.group), (0, 0)))
        x = rearrange(x, "b (n c) k g d -> n (b k) c g d", c=self.span)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))

    def queries(self, x: Float[Array, "spans heads span_and_1 slab D"]) -> Float[Array, "B C H D"]:
        """`slabs` undone."""
        x = x[:, :, : self.span, : self.group]
        return rearrange(x, "n (b k) c g d -> b (n c) (k g) d", k=self.key_heads)[:, : self.shape[1]]

    def choices(self, x: Array, none: Any) -> Array:
        """[B, K, C, N] by spans: [spans, heads, span, N]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.span), (0, 0)), constant_values=none)
        return rearrange(x, "b k (n c) m -> n (b k) c m", c=self.span)

    def work(self, chosen: Array, weights: Array, pages: int) -> tuple[Work, Tiles]:
        """What a kernel needs for the choices of each span; leading axis: spans."""
        found = tiles(self.choices(chosen, -1), pages, self.block)
        some = found.pair >= 0
        index = jnp.where(some, found.pair % self.span, self.span)
        index = jnp.concatenate([index, found.filled[..., None]], axis=-1)[..., None, :]
        flat = rearrange(self.choices(weights, 0.0), "n h c m -> n h 1 (m c)")
        weight = jnp.take_along_axis(flat, jnp.maximum(found.pair, 0), axis=-1)
        weight = jnp.repeat(jnp.where(some, weight, 0.0), self.slab, axis=-1)[..., None, :]
        return Work(rearrange(found.page, "n h t -> n (h t)"), found.total, index, weight), found


def hsa_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B K C N"],
    weights: Float[Array, "B K C N"],
    *,
    scale: float,
    block: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B C H D"]:
    """`pallas_kernels.api.hsa_attention` on a TPU; see there for the arguments.

    block: rows of a tile, of which each pair has one for each query head of its key head.
    """
    group, choices, pages = q.shape[2] // k.shape[1], chosen.shape[3], k.shape[2]
    slab = 1 << (group - 1).bit_length() if group < SUBLANES else -(-group // SUBLANES) * SUBLANES

    def pairs(span: int) -> int:
        """Of a tile."""
        rows = block or _tile_rows(span * choices * slab // pages)
        return min(-(-rows // (slab * TOGETHER)), -(-span * choices // TOGETHER)) * TOGETHER

    span = min(q.shape[1], max(1, RESIDENT // (slab * -(-q.shape[3] // LANES))))
    while span > 1 and k.shape[0] * k.shape[1] * most_tiles(span * choices, pages, pairs(span)) > TABLE:
        span = -(-span // 2)
    static = _Static(scale, group, slab, span, pairs(span), q.shape, interpret)
    return _attention(static, q, k, v, weights.astype(jnp.float32), chosen)


def _tile_rows(each: int) -> int:
    """Of a tile, for pages with `each` rows on average: room for half as many more costs less than another tile."""
    return min(max(1 << (each + each // 2).bit_length(), LEAST), MOST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Array, k: Array, v: Array, weights: Array, chosen: Array) -> Array:
    flat_k, flat_v = (rearrange(x, "b k p s d -> (b k) p s d") for x in (k, v))
    work, _ = static.work(chosen, weights, k.shape[2])

    def span(carry: None, x: tuple[Work, Array]) -> tuple[None, Array]:
        return carry, hsa_kernels.forward(static.scale, *x, flat_k, flat_v, static.interpret)

    return static.queries(_scan(span, None, (work, static.slabs(q)))[1])


def _forward(static: _Static, q: Array, k: Array, v: Array, weights: Array, chosen: Array) -> Any:
    return _attention(static, q, k, v, weights, chosen), (q, k, v, weights, chosen)


def _backward(static: _Static, saved: Any, d_out: Array) -> Any:
    q, k, v, weights, chosen = saved
    flat_k, flat_v = (rearrange(x, "b k p s d -> (b k) p s d") for x in (k, v))
    work, found = static.work(chosen, weights, k.shape[2])

    def span(sums: tuple[Array, Array], x: tuple[Work, Array, Array]) -> Any:
        d_q, d_rows, d_k, d_v = hsa_kernels.backward(static.scale, *x, flat_k, flat_v, *sums, static.interpret)
        return (d_k, d_v), (d_q, d_rows)

    zeros = jnp.zeros(flat_k.shape, jnp.float32)
    (d_k, d_v), (d_q, d_rows) = _scan(span, (zeros, zeros), (work, static.slabs(q), static.slabs(d_out)))
    d_pairs = jnp.sum(rearrange(d_rows, "n h t 1 (r g) -> n h (t r) g", g=static.slab), axis=-1)
    d_pairs = jnp.take_along_axis(d_pairs, jnp.maximum(found.place, 0), axis=-1)
    d_weights = rearrange(
        jnp.where(found.place < 0, 0.0, d_pairs), "n (b k) (m c) -> b k (n c) m", k=k.shape[1], c=static.span
    )[:, :, : q.shape[1]]
    return (
        static.queries(d_q).astype(q.dtype), d_k.reshape(k.shape).astype(k.dtype),
        d_v.reshape(v.shape).astype(v.dtype), d_weights, no_gradient(chosen),
    )  # fmt: skip


_attention.defvjp(_forward, _backward)


def _scan(body: Any, carry: Any, x: Any) -> Any:
    """`lax.scan`, without a loop where there is one turn."""
    if jax.tree.leaves(x)[0].shape[0] > 1:
        return lax.scan(body, carry, x)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], x))
    return carry, jax.tree.map(lambda x: x[None], out)
