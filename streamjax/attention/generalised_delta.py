"""The delta rule generalised, as RWKV-7 has it (2503.14456): where a token writes is not what it reads a state by.

A head keeps a matrix S of K x V numbers. A token decays each row, adds what `erase` has read of the state before it
along `write`, and adds its own key and value:

    S_t = diag(decay_t) S_{t-1} + write_t (erase_t^T S_{t-1}) + k_t v_t^T,   read as S_t^T q_t.

With `erase = k`, `write = -beta decay k` and `beta v` it is the delta rule of `attention/recurrent.py`. Inside a block
what tokens erase depends on what those before them erased: a triangular system, solved for all blocks at once; between
blocks the state is handed on. Decays are kept as logarithms, and only sums that are at most 0 become exponentials.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator

BLOCK = 16  # tokens of a block: each pair of them has K decays


def generalised_delta(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    erase: Float[Array, "B T G K"],
    write: Float[Array, "B T G K"],
    log_decay: Float[Array, "B T G K"],
    state: Float[Array, "B G K V"],
    *,
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"]]:
    """Read T tokens: what each reads from the state that it has written to, and the state behind them.

    Args:
      q, k, v: queries, keys and values of G heads.
      erase, write: what a token reads of the state before it, and where it adds that, with its sign.
      log_decay: logarithms of the decays of a state's rows, at most 0.
      state: in front of the tokens, in the dtype of sums.
      valid: the tokens that count; the others change no state, and their outputs mean nothing. All where None.
      resets: the tokens that begin with an empty state.
      block: tokens of a block.

    Returns:
      Outputs in the dtype of sums, and the new state. A row without valid tokens keeps its state bit for bit.
    """
    dtype, length = accumulator(v.dtype), v.shape[1]
    q, k, v, erase, write, log_decay = (x.astype(dtype) for x in (q, k, v, erase, write, log_decay))
    if valid is not None:
        counted = valid[:, :, None, None]
        v, write, log_decay = (jnp.where(counted, x, 0.0) for x in (v, write, log_decay))
    if length == 1:
        first = None if resets is None else resets[:, 0, None, None, None]
        before = state if first is None else jnp.where(first, 0.0, state)
        erased = jnp.einsum("bgk,bgkv->bgv", erase[:, 0], before)
        new = jnp.exp(log_decay[:, 0])[..., None] * before + write[:, 0, ..., None] * erased[..., None, :]
        new = new + k[:, 0, ..., None] * v[:, 0, ..., None, :]
        out = jnp.einsum("bgk,bgkv->bgv", q[:, 0], new)[:, None]
    else:
        out, new = _read_blocks(q, k, v, erase, write, log_decay, state, resets, min(block, length))
        out = out[:, :length]
    new = new.astype(state.dtype)
    return out, new if valid is None else jnp.where(jnp.any(valid, axis=1)[:, None, None, None], new, state)


def _read_blocks(
    q: Array, k: Array, v: Array, erase: Array, write: Array, log_decay: Array, state: Array, resets: Any, size: int
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"]]:
    def cut(x: Array, pattern: str = "b (n c) g k -> n b g c k") -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
        return rearrange(x, pattern, c=size)

    q, k, v, erase, write, log_decay = map(cut, (q, k, v, erase, write, log_decay))
    upto = jnp.cumsum(log_decay, axis=-2)  # of the decays from the block's start, a token's own among them
    before = jnp.pad(upto[..., :-1, :], ((0, 0),) * 3 + ((1, 0), (0, 0)))
    seen = jnp.tril(jnp.ones((size, size), bool))
    earlier = jnp.tril(seen, -1)
    first = last = None
    if resets is not None:
        segment = jnp.cumsum(cut(resets, "b (n c) -> n b c"), axis=-1)
        same = (segment[..., :, None] == segment[..., None, :])[:, :, None]
        seen, earlier = seen & same, earlier & same
        first, last = (segment == 0)[:, :, None, :, None], (segment == segment[..., -1:])[:, :, None, :, None]

    def scores(a: Array, along: Array, b: Array, mask: Array) -> Array:
        # A sum and no product of matrices: the compiler fuses it, and the decays of all pairs are never there.
        decay = jnp.exp(jnp.where(mask[..., None], along[..., :, None, :] - upto[..., None, :, :], -jnp.inf))
        return jnp.sum(a[..., :, None, :] * b[..., None, :, :] * decay, axis=-1)

    def masked(x: Array, mask: Array | None) -> Array:
        return x if mask is None else jnp.where(mask, x, 0.0)

    identity = jnp.eye(size, dtype=v.dtype)
    right = jnp.concatenate((scores(erase, before, k, earlier) @ v, masked(erase * jnp.exp(before), first)), axis=-1)
    solved = jax.lax.linalg.triangular_solve(
        identity - scores(erase, before, write, earlier), right, left_side=True, lower=True, unit_diagonal=True
    )
    erased, of_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    end = jnp.exp(upto[..., -1:, :] - upto)
    xs = (
        masked(q * jnp.exp(upto), first),
        scores(q, upto, k, seen) @ v,
        scores(q, upto, write, seen),
        erased,
        of_state,
        jnp.swapaxes(masked(k * end, last), -1, -2) @ v,
        jnp.swapaxes(masked(write * end, last), -1, -2),
        masked(jnp.exp(upto[..., -1, :]), None if first is None else first[..., -1, :])[..., None],
    )

    def step(state: Array, block: tuple[Array, ...]) -> tuple[Array, Array]:
        q, own, of_erased, erased, of_state, written, writes, kept = block
        erased = erased + of_state @ state
        return kept * state + written + writes @ erased, q @ state + own + of_erased @ erased

    state, out = jax.lax.scan(step, state, xs)
    return rearrange(out, "n b g c v -> b (n c) g v"), state
