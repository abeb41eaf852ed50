"""Streams that are given as lists of rows of different lengths: each reads, scores and generates as it would alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.streaming.token_rows import as_rows
from tests.streaming.tiny_models import GQA, VOCAB, build

CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14))
GREEDY = sj.Sampler(temperature=0)
RAGGED = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [35], [8, 9, 7, 9]]


@pytest.fixture(scope="module")
def model() -> sj.Decoder:
    return build(GQA.replace(num_layers=1))


def fresh(model, rows: int = 3) -> sj.StreamState:
    return sj.init_state(model, CACHE, rows)


@pytest.mark.parametrize(
    "rows",
    [RAGGED, tuple(map(tuple, RAGGED)), [np.array(row) for row in RAGGED], [jnp.array(row) for row in RAGGED]],
    ids=["lists", "tuples", "numpy", "jax"],
)
def test_rows_of_different_lengths_are_streams_apart(model, rows):
    state, nll = sj.score(model, fresh(model), rows, chunk_size=4)
    read = sj.read(model, fresh(model), rows, chunk_size=4)
    went_on, tokens = sj.generate(model, fresh(model), rows, max_new_tokens=6, sampler=GREEDY, chunk_size=4)
    assert nll.shape == (3, 9)
    assert state.seen.tolist() == read.seen.tolist() == [9, 1, 4]
    for i, row in enumerate(RAGGED):  # beside copies of itself: by the same programs
        alone, cost = sj.score(model, fresh(model), [row] * 3, chunk_size=4)
        np.testing.assert_allclose(nll[i, : len(row)], cost[0], atol=1e-4)
        assert np.all(np.asarray(nll)[i, len(row) :] == 0)
        np.testing.assert_allclose(read.hidden[i], alone.hidden[0], atol=1e-4)
        _, expected = sj.generate(model, fresh(model), [row] * 3, max_new_tokens=6, sampler=GREEDY, chunk_size=4)
        np.testing.assert_array_equal(tokens[i], expected[0])
    # a stream that has nothing more to read stands still
    state, more = sj.generate(model, went_on, [[7], [], [1]], max_new_tokens=2, sampler=GREEDY)
    assert state.seen.tolist() == [9 + 6 + 3, 1 + 6 + 2, 4 + 6 + 3]
    assert more.shape == (3, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), min_size=1, max_size=5))
def test_nothing_but_padding_is_added(rows):
    array, lengths = as_rows(rows)
    assert [array[i, :n].tolist() for i, n in enumerate(lengths)] == rows
    assert array.shape == (len(rows), max(map(len, rows)))
    shorter = [len(row) // 2 for row in rows]
    assert as_rows(rows, shorter)[1].tolist() == shorter


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        ([1, 2, 3], None, "row 0 of the tokens is a single number; give one list a stream"),
        (np.arange(3), None, r"tokens must be \[batch, length\], one row a stream; got shape \[3\]"),
        ([[1, 2], [[3]]], None, r"row 1 of the tokens is an array of shape \[1, 1\]"),
        ([[1, 2], [3, [4]]], None, "row 1 of the tokens is no sequence of token ids"),
        ([[1, 2], [0.5]], None, "row 1 of the tokens must hold whole numbers, got float64"),
        ([["a"]], None, "row 0 of the tokens must hold whole numbers"),
        ("abc", None, "tokens must be an array .* or a list of rows, got str"),
        (7, None, "tokens must be an array .* or a list of rows, got int"),
        ([[1, 2**70]], None, "row 0 of the tokens must hold whole numbers"),
        ([[1, 2], [3]], [2, 2], r"lengths must be one number in \[0, 2\] a row, got \[2, 2\]"),
        ([[1, 2], [3]], [2, 0.5], r"lengths must be one number in \[0, 2\] a row"),
        ([[1, 2], [3]], [1], r"lengths must be one number in \[0, 2\] a row, got \[1\]"),
        ([[1, 2], [3, VOCAB]], None, f"token id {VOCAB} at place 1 of row 1 is outside the model's vocabulary"),
        ([[1, 2], [-1]], None, "token id -1 at place 0 of row 1 is outside the model's vocabulary"),
        ([[1, 2]], None, "1 rows of tokens for 2 streams"),
    ],
)
def test_what_is_no_rows_of_ids_is_told_in_one_line(model, untyped, rows, lengths, message):
    state = fresh(model, 2)
    for call in (sj.read, sj.score):
        with pytest.raises(ValueError, match=message) as error:
            call(model, state, rows, lengths=lengths)
        assert "\n" not in str(error.value)
    assert not jax.tree.leaves(state)[0].is_deleted()
