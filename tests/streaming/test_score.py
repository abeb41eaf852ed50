"""Scores of a stream: the log-softmax of the model as pretrained, however the stream is cut."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

LENGTH, CHUNK = 40, 8
DENSE = sj.kv.preset("dense", capacity=2 * LENGTH)


@pytest.fixture(scope="module")
def scored():
    """A model, two rows of tokens and what each token costs, from the forward pass."""
    model, tokens = build(GQA), random_tokens(2, LENGTH)
    log_probability = np.asarray(jax.nn.log_softmax(sj.forward(model, tokens), axis=-1))
    nll = -np.take_along_axis(log_probability[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return model, tokens, np.concatenate((np.full((2, 1), np.log(VOCAB)), nll), axis=1)


@pytest.mark.quick
def test_score_is_the_shifted_log_softmax_of_forward(scored):
    model, tokens, expected = scored
    state, nll = sj.score(model, sj.init_state(model, DENSE, batch_size=2), tokens, CHUNK)
    assert nll.shape == tokens.shape
    np.testing.assert_allclose(nll, expected, atol=1e-4, rtol=0)
    assert state.seen.tolist() == [LENGTH, LENGTH]


@settings(max_examples=8)
@given(cuts=st.lists(st.sampled_from([0, 1, CHUNK, 2 * CHUNK + 1, LENGTH]), max_size=4))
def test_scored_in_pieces_as_scored_at_once(scored, cuts):
    """Also pieces of no token, and pieces shorter than a chunk."""
    model, tokens, expected = scored
    state, pieces = sj.init_state(model, DENSE, batch_size=2), []
    edges = [0, *sorted(cuts), LENGTH]
    for start, end in itertools.pairwise(edges):
        state, nll = sj.score(model, state, tokens[:, start:end], CHUNK)
        pieces.append(np.asarray(nll))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-4, rtol=0)


@settings(max_examples=8)
@given(pieces=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=4))
def test_ragged_rows(scored, pieces):
    """Rows of their own lengths, in pieces; padding costs nothing and is never read."""
    model, tokens, expected = scored
    state, at = sj.init_state(model, DENSE, batch_size=2), np.zeros(2, int)
    for lengths in pieces:
        block = np.full((2, 13), VOCAB - 1, np.int32)
        for row in range(2):
            block[row, : lengths[row]] = tokens[row, at[row] : at[row] + lengths[row]]
        state, nll = sj.score(model, state, block, CHUNK, lengths=np.array(lengths))
        for row in range(2):
            span = slice(at[row], at[row] + lengths[row])
            np.testing.assert_allclose(nll[row, : lengths[row]], expected[row, span], atol=1e-4, rtol=0)
            assert np.all(np.asarray(nll)[row, lengths[row] :] == 0)
        at += lengths
    assert state.seen.tolist() == at.tolist()


def test_a_long_stretch_runs_in_groups_of_chunks(scored):
    """More chunks than one compiled scan takes, and single chunks behind them."""
    model, tokens, expected = scored
    state, nll = sj.score(model, sj.init_state(model, DENSE, batch_size=2), tokens, 2)
    np.testing.assert_allclose(nll, expected, atol=1e-4, rtol=0)
    assert state.seen.tolist() == [LENGTH, LENGTH]


@pytest.mark.quick
def test_read_leaves_the_state_that_score_leaves(scored):
    model, tokens, _ = scored
    read = sj.read(model, sj.init_state(model, DENSE, batch_size=2), tokens, CHUNK, lengths=np.array([LENGTH, 11]))
    state = sj.init_state(model, DENSE, batch_size=2)
    state, _ = sj.score(model, state, tokens, CHUNK, lengths=np.array([LENGTH, 11]))
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros(4, np.int32), {}, "must be \\[batch, length\\]"),
        (np.zeros((2, 4), np.int32), {"lengths": np.array([5, 1])}, "lengths must be one number in \\[0, 4\\] a row"),
        (np.zeros((2, 4), np.int32), {"lengths": np.array([-1, 1])}, "lengths must be one number"),
        (np.zeros((2, 4), np.int32), {"lengths": np.array([1])}, "lengths must be one number"),
        (np.zeros((2, 4), np.int32), {"chunk_size": 0}, "chunk_size must be at least 1"),
        (np.zeros((3, 4), np.int32), {}, "3 rows of tokens for 2 streams"),
    ],
)
@pytest.mark.parametrize("call", [sj.score, sj.read])
def test_wrong_arguments(scored, untyped, call, tokens, options, message):
    model, _, _ = scored
    for cache in (DENSE, sj.kv.preset("window", window=3)):
        with pytest.raises(ValueError, match=message) as error:
            call(model, sj.init_state(model, cache, batch_size=2), tokens, **options)
        assert "\n" not in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize("wrong", [VOCAB, 10**6, -1, -VOCAB])
@pytest.mark.parametrize("call", [sj.score, sj.read])
def test_ids_that_the_model_lacks_are_refused_by_place(scored, call, wrong):
    """Real ones only: whatever stands in padding is not read."""
    model, tokens, expected = scored
    tokens = tokens.copy()
    tokens[1, 23] = wrong
    state = sj.init_state(model, DENSE, batch_size=2)
    with pytest.raises(
        ValueError, match=f"token id {wrong} at place 23 of row 1 is outside the model's vocabulary of {VOCAB};"
    ) as error:
        call(model, state, tokens, CHUNK, lengths=np.array([LENGTH, 24]))
    assert "\n" not in str(error.value)
    state, nll = sj.score(model, state, tokens, CHUNK, lengths=np.array([LENGTH, 23]))  # the state is still there
    np.testing.assert_allclose(nll[0], expected[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(nll[1, :23], expected[1, :23], atol=1e-4, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("call", [sj.score, sj.read])
def test_ids_are_whole_numbers(scored, untyped, call):
    model, tokens, _ = scored
    with pytest.raises(ValueError, match="tokens must be whole numbers, got float64"):
        call(model, sj.init_state(model, DENSE, batch_size=2), tokens.astype(np.float64))
    call(model, sj.init_state(model, DENSE, batch_size=2), [[], []])  # an empty list has no type of its own
