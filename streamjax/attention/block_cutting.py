"""Cutting a sequence into blocks of one size, and putting them together again."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array


def cut_blocks(x: Array, size: int, stretches: int = 1) -> Array:
    """[B, T, ...] as [N, B, C, ...], C = `size`, padded with zeros.

    With several equal `stretches` in a row, such as devices have of a sequence, a block has `size` tokens of each.
    """
    rows = rearrange(x, "b (p t) ... -> b p t ...", p=stretches)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % size)) + ((0, 0),) * (rows.ndim - 3))
    return rearrange(padded, "b p (n c) ... -> n b (p c) ...", c=size)


def join_blocks(x: Array, length: int, stretches: int = 1) -> Array:
    """[N, B, C, ...] as [B, T, ...], T = `length`, without the padding; the inverse of `cut_blocks`."""
    rows = rearrange(x, "n b (p c) ... -> b p (n c) ...", p=stretches)[:, :, : length // stretches]
    return rearrange(rows, "b p t ... -> b (p t) ...")


def even_batch(blocks: int, most: int) -> int:
    """How many of so many blocks to work on at a time, at most `most` and at least 1: a divisor, where there is one.

    `jax.lax.map` compiles its body a second time for a rest. Of divisors less than half of `most` none is taken.
    """
    most = max(1, min(most, blocks))
    return next((size for size in range(most, most // 2, -1) if blocks % size == 0), most)
