"""Cutting a stream into chunks any way gives the same logits: one cache of each kind, one a layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_padded, read_stream

LENGTH = 288
CACHES = (
    sj.kv.preset("streaming_llm", sinks=3, window=20),
    sj.kv.preset("dense", capacity=LENGTH),
    sj.kv.Cascade(sj.kv.Sink(5), sj.kv.Window(25), fuse=False),
)
PADDED = 32  # longer than all windows


@pytest.fixture(scope="module")
def mixed():
    """A model with a cache of its own in each layer, tokens, and logits read one token at a time."""
    model = build(GQA.replace(num_layers=len(CACHES)))
    tokens = random_tokens(1, LENGTH)
    _, logits = read_stream(model, sj.init_state(model, CACHES), tokens, [1])
    assert np.isfinite(logits).all()
    return model, tokens, logits


@pytest.fixture(scope="module")
def local():
    """A model with a window and soft caps of its own, under sinks and a window."""
    model = build(LOCAL)
    cache = sj.kv.preset("streaming_llm", sinks=3, window=10)
    tokens = random_tokens(1, 96)
    _, logits = read_stream(model, sj.init_state(model, cache), tokens, [1])
    return model, cache, tokens, logits


@pytest.mark.usual("7")
@pytest.mark.parametrize("cut", [[7] * 41 + [1], [32], [256, 32]], ids=["7", "32", "256"])
def test_fixed_widths(mixed, cut):
    """From chunks inside the sinks to chunks that are longer than every window."""
    model, tokens, expected = mixed
    state, logits = read_stream(model, sj.init_state(model, CACHES), tokens, cut)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert int(state.seen[0]) == int(state.position[0]) == LENGTH
    np.testing.assert_allclose(model.logits(state.hidden[:, None]), expected[:, -1:], atol=1e-4, rtol=0)


@settings(max_examples=10)
@given(widths=st.lists(st.sampled_from([1, 7]), min_size=1, max_size=9))
def test_drawn_widths(mixed, widths):
    model, tokens, expected = mixed
    total = sum(widths)
    _, logits = read_stream(model, sj.init_state(model, CACHES), tokens[:, :total], widths)
    np.testing.assert_allclose(logits, expected[:, :total], atol=1e-4, rtol=0)


@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, PADDED), min_size=1, max_size=8).filter(any))
def test_drawn_counts_in_padded_chunks(mixed, counts):
    model, tokens, expected = mixed
    _, logits = read_padded(model, sj.init_state(model, CACHES), tokens[0], counts, PADDED)
    np.testing.assert_allclose(logits, expected[0, : sum(counts)], atol=1e-4, rtol=0)


@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, PADDED // 2), min_size=1, max_size=6).filter(any))
def test_drawn_counts_with_windows_of_the_models_own(local, counts):
    model, cache, tokens, expected = local
    _, logits = read_padded(model, sj.init_state(model, cache), tokens[0], counts, PADDED // 2)
    np.testing.assert_allclose(logits, expected[0, : sum(counts)], atol=1e-4, rtol=0)
