"""Sinks at their true distance: two billion tokens later a query sees them there, in chunks and token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.rotary import Rotary
from streamjax.kv import Cascade, Sink, Window
from streamjax.kv.tiers.sink import TRUE_DISTANCE
from tests.kv.tier_streams import FREQUENCIES, HEADS, KEY_HEADS, SCALE, Stream, empty, spec, update

SINKS, WINDOW, LENGTH = 2, 3, 12
FAR = 2**31 + 1000  # behind which a difference of positions is negative as an int32
ROTARY = Rotary.from_frequencies(np.array(FREQUENCIES))


@partial(jax.jit, static_argnums=1)
def turned(x, first: int):
    """[1, T, H, D] at the positions from `first` on."""
    return ROTARY(x, (jnp.uint32(first) + jnp.arange(x.shape[1], dtype=jnp.uint32))[None])


def read(cascade: Cascade, stream: Stream, widths: list[int]) -> np.ndarray:
    """The sinks at position 0, all other tokens from `FAR` on; outputs of these."""
    state, at, outs = empty(cascade, spec()), 0, []
    for width in [SINKS, *widths]:
        pieces = (jnp.asarray(x[:, at : at + width], jnp.float32) for x in (stream.q, stream.k, stream.v))
        first, seen = (0, 0) if at == 0 else (FAR + at - SINKS, min(FAR + at - SINKS, 2**30))
        position = jnp.asarray(np.arange(first, first + width)[None], jnp.uint32)
        out, state = update(
            cascade, state, *pieces, None, position, jnp.full((1,), seen, jnp.int32), jnp.ones((1, width), bool), None,
            ROTARY,
        )  # fmt: skip
        outs.append(np.asarray(out))
        at += width
    return np.concatenate(outs[1:], axis=1)


@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sinks_stand_where_they_are_however_far_away(fuse):
    stream = Stream.drawn(1, LENGTH)
    cascade = Cascade(Sink(SINKS, reach=TRUE_DISTANCE), Window(WINDOW), fuse=fuse)
    found = read(cascade, stream, [4] * 2 + [2])
    np.testing.assert_allclose(read(cascade, stream, [1] * (LENGTH - SINKS)), found, atol=1e-5)
    q, k = jnp.asarray(stream.q[:, SINKS:], jnp.float32), jnp.asarray(stream.k, jnp.float32)
    q = np.asarray(turned(q, FAR))[0]
    keys = np.concatenate((turned(k[:, :SINKS], 0), turned(k[:, SINKS:], FAR)), axis=1)[0]
    for i in range(LENGTH - SINKS):
        own = range(SINKS + max(i - WINDOW, 0), SINKS + i + 1)
        seen = [*range(SINKS), *own]
        for head in range(HEADS):
            key_head = head * KEY_HEADS // HEADS
            logits = SCALE * keys[seen, key_head] @ q[i, head]
            weights = np.exp(logits - logits.max())
            expected = weights @ stream.v[0, seen, key_head] / weights.sum()
            np.testing.assert_allclose(found[0, i, head], expected, atol=1e-5)
