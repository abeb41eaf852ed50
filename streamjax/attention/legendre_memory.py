"""Memories of a channel's last theta values as N Legendre polynomials: `m_t = A m_{t-1} + B u_t` with fixed A and B.

A and B are those of the delay (Voelker, Kajic & Eliasmith, 2019), with the input held for a token. Nothing in them is
learned or depends on tokens, so inside a block of tokens the memories are sums of the powers `A^j B` times the inputs
and of those of A times the state in front of it.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float
from scipy.linalg import expm

from pallas_kernels.partial import accumulator

BLOCK = 64  # tokens


@cache
def delay(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N] of a step of one token, in float64."""
    row, column = np.indices((order, order))
    # From the delay's differential equation theta m' = a m + b u, solved for an input that does not change.
    a = (2 * row + 1) * np.where(row < column, -1.0, (-1.0) ** (row - column + 1))
    b = (2 * np.arange(order) + 1) * (-1.0) ** np.arange(order)
    whole = expm(np.block([[a, b[:, None]], [np.zeros((1, order + 1))]]) / theta)
    return whole[:order, :order], whole[:order, order]


@cache
def _powers(order: int, theta: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A^1, ..., A^size, and B, A B, ..., A^(size - 1) B."""
    a, b = delay(order, theta)
    powers = [np.eye(order)]
    for _ in range(size):
        powers.append(a @ powers[-1])
    return np.stack(powers[1:]), np.stack(powers[:-1]) @ b


def legendre_memory(
    u: Float[Array, "B T G D"],
    state: Float[Array, "B G N D"],
    *,
    theta: float,
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "B T G N D"], Float[Array, "B G N D"]]:
    """Read T tokens: the memories behind each of them, and behind the last.

    Args:
      u: what is remembered, each channel by itself.
      state: in front of the tokens, in the dtype of sums (float32; float64 for float64).
      theta: how many tokens back a memory tells.
      valid: the tokens that count, the first ones of each row; memories behind others mean nothing. All where None.
      resets: the tokens that begin with empty memories.
      block: tokens that are read at once.

    Returns:
      Memories in the dtype of sums, and the new state. A row without valid tokens keeps its state bit for bit.
    """
    dtype, length = accumulator(u.dtype), u.shape[1]
    size = min(block, length)
    powers, pulses = (jnp.asarray(x, dtype) for x in _powers(state.shape[2], theta, size))
    ages = jnp.arange(size)[:, None] - jnp.arange(size)
    told = jnp.where((ages >= 0)[..., None], pulses[jnp.maximum(ages, 0)], 0.0)  # [later, earlier, N]

    def read(state: Array, piece: tuple[Array, Array | None]) -> tuple[Array, Array]:
        u, segment = piece
        old = jnp.einsum("tnm,bgmd->btgnd", powers, state)
        if segment is None:
            out = jnp.einsum("tsn,bsgd->btgnd", told, u) + old
        else:
            same = (segment[:, :, None] == segment[:, None]).astype(dtype)
            out = jnp.einsum("tsn,bts,bsgd->btgnd", told, same, u)
            out = out + jnp.where((segment == 0)[:, :, None, None, None], old, 0.0)
        return out[:, -1], out

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
        return rearrange(x, "b (n c) ... -> n b c ...", c=size)

    segments = None if resets is None else jnp.cumsum(cut(resets), axis=-1, dtype=jnp.int32)
    _, pieces = jax.lax.scan(read, state, (cut(u.astype(dtype)), segments))
    out = rearrange(pieces, "n b c g m d -> b (n c) g m d")[:, :length]
    if valid is None:
        return out, out[:, -1].astype(state.dtype)
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    newest = jax.vmap(lambda row, last: jax.lax.dynamic_index_in_dim(row, last, 0, keepdims=False))(
        out, jnp.maximum(count - 1, 0)
    )
    return out, jnp.where((count > 0)[:, None, None, None], newest.astype(state.dtype), state)
