"""What every query of a stream sees in a cascade, and at which distance, read off the attention output itself.

Values are one-hot in the token's index, queries and keys are zero and an ALiBi slope is added, so token i weighs
exp(-slope * distance) and the output says which tokens were seen and how far away they stood.
"""

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.kv import Cascade, KVSpec, KVTokens, Query

SLOPE = 0.25


def _update(cascade: Cascade, state, value, position, valid, seen):
    batch, chunk, _, width = value.shape
    zero = jnp.zeros((batch, chunk, 1, width), jnp.float32)
    keys = jnp.swapaxes(zero, 1, 2)
    query = Query(
        q=zero,
        raw_q=zero,
        position=position,
        seen=seen,
        slopes=jnp.array([SLOPE]),
        rotary=None,
        scale=1.0,
        softcap=None,
    )
    tokens = KVTokens(k=keys, v=jnp.swapaxes(value, 1, 2), raw_k=keys, position=position[:, None], valid=valid[:, None])
    return cascade.update(state, query, tokens)


update = jax.jit(_update, static_argnums=0)


def distances(cascade: Cascade, total: int, counts, width: int | None = None, start: int = 0) -> np.ndarray:
    """[total, total] distances from query i (row) to token j as the cascade showed it; NaN where j was not seen.

    `counts` real tokens go into each chunk, again from the first when they run out; chunks are `width` wide (the count
    itself where None) and right-padded. `start` is the stream position of the first token, modulo 2^32.
    """
    state = cascade.init(KVSpec(1, 1, total, jnp.dtype(jnp.float32)))
    rows, seen, turn = [], 0, 0
    while seen < total:
        count = min(counts[turn % len(counts)], total - seen)
        turn += 1
        wide = count if width is None else width
        index = seen + np.arange(wide)
        value = np.where(np.arange(wide)[:, None] < count, np.eye(total)[index % total], 1e6)
        position = ((index + start) % 2**32).astype(np.uint32)[None]
        out, state = update(
            cascade,
            state,
            value.astype(np.float32)[None, :, None],
            position,
            (np.arange(wide) < count)[None],
            np.array([seen], np.int32),
        )
        rows.append(np.asarray(out)[0, :count, 0])
        seen += count
    weight = np.concatenate(rows)
    own = np.diagonal(weight)[:, None]
    with np.errstate(divide="ignore"):
        far = np.log(own / weight) / SLOPE
    return np.where(weight > 1e-12, np.round(far, 2), np.nan)
