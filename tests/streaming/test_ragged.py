"""Rows of a batch are streams of their own: their own lengths, padding that leaves no trace, rows that stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

ROWS, WIDTH, LENGTH = 3, 6, 40
CACHES = (
    sj.kv.preset("streaming_llm", sinks=2, window=5),
    sj.kv.preset("dense", capacity=LENGTH),
    sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(3), sj.kv.Scored(6, sj.kv.H2O(), every=4)),
)


@pytest.fixture(scope="module")
def alone():
    """A model, tokens [ROWS, LENGTH], and every row's logits beside copies of itself, token by token.

    So rows are read by one program whether they are alike or not: what comes from another row shows in these only.
    """
    model, tokens = build(GQA.replace(num_layers=len(CACHES))), random_tokens(ROWS, LENGTH)
    logits = []
    for row in range(ROWS):
        state, pieces = sj.init_state(model, CACHES, batch_size=ROWS), []
        for i in range(LENGTH):
            same = np.full((ROWS, 1), tokens[row, i])
            state, out = sj.step(model, state, same, jnp.ones(ROWS, jnp.int32))
            pieces.append(np.asarray(out)[0])
        logits.append(np.concatenate(pieces))
    return model, tokens, np.stack(logits)


def read_ragged(model, tokens, counts, width: int):
    """Read `counts` [steps][rows] tokens in padded chunks; every row's logits, and the state."""
    state, start, logits = sj.init_state(model, CACHES, batch_size=ROWS), np.zeros(ROWS, int), [[] for _ in range(ROWS)]
    for count in counts:
        count = np.minimum(count, LENGTH - start)
        chunk = np.full((ROWS, width), VOCAB, np.int32)  # an id that the model lacks: read, it would make NaN
        for row in range(ROWS):
            chunk[row, : count[row]] = tokens[row, start[row] : start[row] + count[row]]
        state, out = sj.step(model, state, chunk, jnp.asarray(count, jnp.int32))
        for row in range(ROWS):
            logits[row].append(np.asarray(out)[row, : count[row]])
        start += count
    return state, [np.concatenate(row) for row in logits]


row_counts = st.lists(st.tuples(*[st.integers(0, WIDTH)] * ROWS), min_size=1, max_size=10)


@settings(max_examples=10)
@given(counts=row_counts)
def test_every_row_is_as_if_alone(alone, counts):
    model, tokens, expected = alone
    state, logits = read_ragged(model, tokens, counts, WIDTH)
    totals = np.minimum(np.sum(counts, axis=0), LENGTH)
    assert state.seen.tolist() == state.position.tolist() == totals.tolist()
    for row in range(ROWS):
        np.testing.assert_allclose(logits[row], expected[row, : len(logits[row])], atol=1e-4, rtol=0)


@settings(max_examples=8)
@given(pattern=st.lists(st.tuples(*[st.integers(0, 1)] * ROWS), min_size=20, max_size=40))
def test_rows_decode_at_their_own_pace(alone, pattern):
    """Single tokens, some rows waiting: the path of one query a row."""
    model, tokens, expected = alone
    _, logits = read_ragged(model, tokens, pattern, 1)
    for row in range(ROWS):
        np.testing.assert_allclose(logits[row], expected[row, : len(logits[row])], atol=1e-4, rtol=0)


def rows_of(state: sj.StreamState, row: int) -> list[np.ndarray]:
    return [np.asarray(leaf)[row] for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_row_without_tokens_keeps_its_state_bit_for_bit(alone, width):
    model, tokens, _ = alone
    counts = [[min(width, 4), 0, min(width, 3)]] * 9
    for still in range(ROWS):
        state, _ = read_ragged(model, tokens, counts, width)
        before = rows_of(state, still)
        count = np.full(ROWS, width)
        count[still] = 0
        state, _ = sj.step(model, state, np.full((ROWS, width), 7, np.int32), jnp.asarray(count, jnp.int32))
        for old, new in zip(before, rows_of(state, still), strict=True):
            assert old.tobytes() == new.tobytes()
