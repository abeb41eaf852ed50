"""The dense cache is the model as pretrained, up to its capacity; beyond it there are no numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, build, random_tokens

CAPACITY, WIDTH, LENGTH = 20, 8, 24
LONG = sj.RopeConfig(
    kind="longrope", original_max_position=LENGTH, short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 4.0, 5.0)
)
MODELS = {
    "gqa": GQA,
    "local": LOCAL.replace(windows=(None, 5)),
    "alibi": ALIBI,
}


def read(model, state, tokens: np.ndarray, counts) -> tuple[sj.StreamState, np.ndarray]:
    """Right-padded chunks of WIDTH; logits of the real tokens."""
    pieces, start = [], 0
    for count in counts:
        chunk = np.zeros((1, WIDTH), np.int32)
        chunk[:, :count] = tokens[:, start : start + count]
        state, logits = sj.step(model, state, chunk, jnp.array([count]))
        pieces.append(np.asarray(logits)[:, :count])
        start += count
    return state, np.concatenate(pieces, axis=1)


@pytest.mark.usual("gqa")
@pytest.mark.parametrize("name", list(MODELS))
def test_dense_is_forward_up_to_its_capacity_and_nan_beyond(name):
    """Token 20 (from 0) is the first too many; the four before it share its chunk. Padding is never too many."""
    model, tokens = build(MODELS[name]), random_tokens(1, LENGTH)
    cache = sj.kv.preset("dense", capacity=CAPACITY)
    expected = np.asarray(sj.forward(model, tokens))
    _, logits = read(model, sj.init_state(model, cache), tokens, [8, 8, 8])
    np.testing.assert_allclose(logits[:, :CAPACITY], expected[:, :CAPACITY], atol=1e-4, rtol=0)
    assert np.isnan(logits[:, CAPACITY:]).all()
    _, logits = read(model, sj.init_state(model, cache), tokens, [8, 5, 6, 1])
    np.testing.assert_allclose(logits, expected[:, :CAPACITY], atol=1e-4, rtol=0)


@pytest.mark.quick
def test_a_full_dense_stream_stays_nan_and_its_neighbour_finite():
    model = build(GQA)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=2), batch_size=2)
    token, seen = jnp.ones((2, 1), jnp.int32), []
    for count in ([1, 1], [1, 0], [1, 0], [1, 1], [0, 0]):
        state, logits = sj.step(model, state, token, jnp.array(count))
        seen.append([bool(np.isnan(np.asarray(logits)[row]).any()) for row in range(2)])
    assert [row[0] for row in seen[:4]] == [False, False, True, True]
    assert [row[1] for row in seen[:4]] == [False, False, False, False]
    assert np.isnan(state.hidden[0]).all()
    assert np.isfinite(state.hidden[1]).all()
    assert state.seen.tolist() == [4, 2]


def test_scaling_that_depends_on_length_takes_the_capacity_for_it():
    """A dense stream of `capacity` tokens is a sequence of that length, not of one more."""
    model, tokens = build(GQA.replace(rope=LONG, num_layers=1)), random_tokens(1, LENGTH)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH))
    _, logits = read(model, state, tokens, [8, 8, 8])
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.quick
def test_streams_that_cannot_fit_are_refused_before_anything_is_read():
    model = build(GQA)

    def state() -> sj.StreamState:
        return sj.init_state(model, sj.kv.preset("dense", capacity=10))

    too_long = random_tokens(1, 11)
    for attempt in (
        lambda: sj.score(model, state(), too_long),
        lambda: sj.read(model, state(), too_long),
        lambda: sj.generate(model, state(), too_long[:, :4], max_new_tokens=7, sampler=sj.Sampler(temperature=0)),
    ):
        with pytest.raises(ValueError, match="holds 10 tokens: 0 are used and 11 more do not fit") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.quick
def test_room_is_counted_row_by_row():
    """A row that is nearly full and gets little, beside an empty one that gets much: both fit."""
    model = build(GQA)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=10), batch_size=2)
    tokens = random_tokens(2, 8)
    state = sj.read(model, state, tokens, 8, lengths=np.array([8, 0]))
    state = sj.read(model, state, tokens, 8, lengths=np.array([2, 8]))
    assert state.seen.tolist() == [10, 8]
    with pytest.raises(ValueError, match="10 are used and 1 more do not fit"):
        sj.read(model, state, tokens, 8, lengths=np.array([1, 0]))
