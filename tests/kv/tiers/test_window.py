"""What a window gives up and a full tier refuses: the right tokens, oldest first, with their keys, values, places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv import Full, KVSpec, KVTokens, Window

ROWS, HEADS, CHANNELS = 2, 2, 3
insert = jax.jit(lambda tier, state, tokens: tier.insert(state, tokens), static_argnums=0)


def tagged(tags: np.ndarray, valid: np.ndarray) -> KVTokens:
    """Tokens whose key, value and position all tell the tag [ROWS, C]."""
    key = np.broadcast_to(tags[:, None, :, None], (*tags.shape[:1], HEADS, tags.shape[1], CHANNELS)).astype(np.float32)
    key = key + np.arange(HEADS)[:, None, None] * 1000
    return KVTokens(
        k=jnp.asarray(key),
        v=jnp.asarray(-key),
        raw_k=jnp.asarray(key + 0.5),
        position=jnp.asarray(tags[:, None] % 2**32, jnp.uint32),
        valid=jnp.asarray(valid[:, None]),
    )


def tags_of(tokens: KVTokens, row: int) -> list[int]:
    """Tags of a row's valid tokens; checks that they are one run and that all their parts agree."""
    run = np.flatnonzero(np.asarray(tokens.valid)[row, 0])
    assert len(run) == 0 or (np.diff(run) == 1).all()
    tags = np.asarray(tokens.position)[row, 0, run].astype(int)
    for head in range(HEADS):
        for channel in range(CHANNELS):
            np.testing.assert_array_equal(np.asarray(tokens.k)[row, head, run, channel], tags + 1000 * head)
            np.testing.assert_array_equal(np.asarray(tokens.v)[row, head, run, channel], -tags - 1000 * head)
    return tags.tolist()


@st.composite
def chunks(draw, width: int):
    """Chunks in which each row has a run of valid tokens, anywhere: (start, count) of every row."""
    rows = []
    for _ in range(ROWS):
        start = draw(st.integers(0, width - 1))
        rows.append((start, draw(st.integers(0, width - start))))
    return rows


@pytest.mark.quick
@pytest.mark.parametrize("width", [1, 3, 9])
@pytest.mark.parametrize("tier", [Window(4), Full(6)], ids=["window", "full"])
@settings(max_examples=15)
@given(data=st.data())
def test_what_falls_out(tier, width, data):
    state = tier.init(KVSpec(ROWS, HEADS, CHANNELS, jnp.dtype(jnp.float32)))
    held, tag = [[] for _ in range(ROWS)], 1
    for runs in data.draw(st.lists(chunks(width), min_size=1, max_size=6)):
        tags = np.arange(tag, tag + ROWS * width).reshape(ROWS, width)
        tag += ROWS * width
        valid = np.zeros((ROWS, width), bool)
        for row, (start, count) in enumerate(runs):
            valid[row, start : start + count] = True
        state, fallen = insert(tier, state, tagged(tags, valid))
        assert fallen.k.shape == fallen.v.shape == (ROWS, HEADS, width, CHANNELS)
        for row, (start, count) in enumerate(runs):
            held[row] += tags[row, start : start + count].tolist()
            if isinstance(tier, Window):
                lost, held[row] = held[row][: -tier.size], held[row][-tier.size :]
            else:
                lost, held[row] = held[row][tier.capacity :], held[row][: tier.capacity]
            assert tags_of(fallen, row) == lost
            assert int(state.filled[row]) == len(held[row])
            slots = np.asarray(state.position)[row, 0, : len(held[row])]
            assert sorted(slots.tolist()) == held[row]
            keys = np.asarray(state.k)[row, 1, : len(held[row]), 0]
            np.testing.assert_array_equal(keys, slots + 1000.0)
            np.testing.assert_array_equal(np.asarray(state.v)[row, 1, : len(held[row]), 2], -keys)
