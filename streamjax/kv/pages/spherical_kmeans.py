"""Spherical k-means of the keys of a segment, for each key head, and the lists of tokens that it makes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator

TOKEN_BLOCK = 1024  # tokens whose products with all centroids exist at a time


def nearest_centroids(keys: Float[Array, "B K S D"], count: int, iterations: int) -> Int32[Array, "B K S"]:
    """Which of `count` clusters each key is in.

    Keys are compared by their direction from the mean of the segment (cosine similarity). The first centroids are the
    directions of tokens at even steps, token i * S // count for centroid i; in each iteration a token goes to the
    centroid that is nearest, the first of equals, and a centroid becomes the direction of the sum of its tokens'. One
    without tokens stays.
    """
    tokens = keys.astype(accumulator(keys.dtype))
    tokens = _directions(tokens - jnp.mean(tokens, axis=2, keepdims=True))
    length = keys.shape[2]
    blocks = -(-length // TOKEN_BLOCK)
    width = -(-length // blocks)
    padded = jnp.pad(tokens, ((0, 0), (0, 0), (0, blocks * width - length), (0, 0)))  # zeros add nothing to a sum
    cut = rearrange(padded, "b k (n s) d -> n b k s d", n=blocks)

    def assign(centroids: Float[Array, "B K N D"]) -> tuple[Array, Array]:
        """The sum of the tokens of each centroid, and the centroid of each token."""

        def block(sums: Array, some: Array) -> tuple[Array, Array]:
            nearest = _first_largest(jnp.einsum("bksd,bknd->bksn", some, centroids, precision="highest"))
            mine = (nearest[:, :, None] == jnp.arange(count, dtype=jnp.int32)[:, None]).astype(some.dtype)
            return sums + jnp.einsum("bkns,bksd->bknd", mine, some, precision="highest"), nearest

        sums, nearest = jax.lax.scan(block, jnp.zeros_like(centroids), cut)
        return sums, rearrange(nearest, "n b k s -> b k (n s)")[:, :, :length]

    def improved(_: Array | int, centroids: Array) -> Array:
        sums = _directions(assign(centroids)[0])
        return jnp.where((sums != 0).any(axis=-1, keepdims=True), sums, centroids)

    even = (jnp.arange(count) * length) // count
    return assign(jax.lax.fori_loop(0, iterations, improved, tokens[:, :, even]))[1]


def runs_of(
    assigned: Int32[Array, "B K S"], most: int, runs: int
) -> tuple[Int32[Array, "B K S"], Int32[Array, "B K N"], Int32[Array, "B K N"]]:
    """The order in which tokens lie cluster by cluster, and where in it each of `runs` runs starts and how long it is.

    A cluster is one run, or several where it has more than `most` tokens; all but the last of them are full. Runs that
    there are not have length 0. Inside a cluster tokens keep their order.
    """
    length = assigned.shape[2]
    order = jnp.argsort(assigned, axis=2, stable=True).astype(jnp.int32)
    sorted_ = jnp.take_along_axis(assigned, order, axis=2)
    index = jnp.arange(length, dtype=jnp.int32)
    another = jnp.concatenate((jnp.ones_like(sorted_[..., :1], bool), sorted_[..., 1:] != sorted_[..., :-1]), axis=2)
    begin = jax.lax.cummax(jnp.where(another, index, 0), axis=2)
    starts = jnp.sort(jnp.where((index - begin) % most == 0, index, length), axis=2)
    starts = jnp.concatenate((starts, jnp.full_like(starts[..., :1], length)), axis=2)[..., : runs + 1]
    return order, starts[..., :-1], jnp.diff(starts, axis=2)


def _first_largest(x: Float[Array, "B K S N"]) -> Int32[Array, "B K S"]:
    """`jnp.argmax` of the last axis by two reductions, which the CPU compiler vectorises, as it does not that one."""
    count = x.shape[-1]
    largest = jnp.max(x, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(x == largest, jnp.arange(count, dtype=jnp.int32), count), axis=-1)
    return jnp.minimum(first, count - 1)


def _directions(x: Float[Array, "B K N D"]) -> Float[Array, "B K N D"]:
    """Vectors of length 1; zero where there is none."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1.0))
