"""Recurrences of single channels, `h_t = decay_t * h_{t-1} + x_t`: RG-LRU (2402.19427), HGRN (2311.04823).

Inside a block an associative scan joins neighbours, and their neighbours, in a number of steps that is the logarithm of
the block's length; between blocks the state is handed on. Decays are at most 1, so no product of them overflows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.context.recurrence import context_elementwise
from streamjax.attention.sharded import context_shards

BLOCK = 256  # tokens that are scanned at once


def elementwise_recurrence(
    x: Float[Array, "B T G D"],
    log_decay: Float[Array, "B T G D"],
    state: Float[Array, "B G D"],
    *,
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B G D"]]:
    """Read T tokens: the state behind each of them, and behind the last.

    Args:
      x: what each token adds.
      log_decay: logarithm of a token's decay, at most 0.
      state: in front of the tokens, in the dtype of sums (float32; float64 for float64).
      valid: the tokens that count; the others change no state. All where None.
      resets: the tokens that begin with an empty state.
      block: tokens that are scanned at once.

    Whole sequences (no `valid`) may lie over the mesh axis `context`; see `context.recurrence`.

    Returns:
      Outputs in the dtype of sums, and the new state. A row without valid tokens keeps its state bit for bit.
    """
    dtype, length = accumulator(x.dtype), x.shape[1]
    if valid is None and context_shards(length) > 1:
        return context_elementwise(elementwise_recurrence, x, log_decay, state, resets)
    decay, x = jnp.exp(log_decay.astype(dtype)), x.astype(dtype)
    if resets is not None:
        decay = jnp.where(resets[:, :, None, None], 0.0, decay)
    if valid is not None:
        decay, x = (jnp.where(valid[:, :, None, None], part, still) for part, still in ((decay, 1.0), (x, 0.0)))
    if length == 1:
        new = decay[:, 0] * state + x[:, 0]
        out = new[:, None]
    else:
        size = min(block, length)
        new, blocks = jax.lax.scan(_read_block, state, (_cut(decay, size, 1.0), _cut(x, size, 0.0)))
        out = rearrange(blocks, "n b c g d -> b (n c) g d")[:, :length]
    new = new.astype(state.dtype)
    return out, new if valid is None else jnp.where(jnp.any(valid, axis=1)[:, None, None], new, state)


def _cut(x: Float[Array, "B T G D"], size: int, still: float) -> Float[Array, "N B C G D"]:
    """Blocks of `size` tokens, the last one filled with such as change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)), constant_values=still)
    return rearrange(x, "b (n c) g d -> n b c g d", c=size)


def _read_block(state: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, added = jax.lax.associative_scan(join, block, axis=1)
    out = decay * state[:, None] + added
    return out[:, -1], out
