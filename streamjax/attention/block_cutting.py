"""Cutting a sequence into blocks of one size, and putting them together again."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array


def cut_blocks(x: Array, size: int) -> Array:
    """[B, T, ...] as [N, B, C, ...], C = `size`, padded with zeros."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return rearrange(padded, "b (n c) ... -> n b c ...", c=size)


def join_blocks(x: Array, length: int) -> Array:
    """[N, B, C, ...] as [B, T, ...], T = `length`, without the padding."""
    return rearrange(x, "n b c ... -> b (n c) ...")[:, :length]


def even_size(length: int, most: int) -> int:
    """The size of as few equal blocks of at most `most` as `length` needs: so little is padded as can be.

    Example:
      >>> even_size(2048, 1365)  # two blocks; of 1,365 each they would hold 2,730
      1024
    """
    return -(-length // -(-length // max(1, most)))


def even_batch(blocks: int, most: int) -> int:
    """How many of so many blocks to work on at a time, at most `most` and at least 1: a divisor, where there is one.

    `jax.lax.map` compiles its body a second time for a rest. Of divisors less than half of `most` none is taken.
    """
    most = max(1, min(most, blocks))
    return next((size for size in range(most, most // 2, -1) if blocks % size == 0), most)
