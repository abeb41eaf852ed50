"""Learned sink logits in a cascade: one more logit in each softmax, without a value, by loops in float64."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamjax.kv import Cascade, Full, Pages, Representative, Sink, Window
from tests.kv.tier_streams import HEADS, KEY_HEADS, SCALE, SLOPES, Stream, run


def weights_by_loops(stream, sinks, slopes=None, softcap=None, window=None):
    """Of every head and query, how much it gives to each key [B, H, T, T]; what is missing to 1 the sink has."""
    rows, length = stream.q.shape[:2]
    found = np.zeros((rows, HEADS, length, length))
    for row, head, i in np.ndindex(rows, HEADS, length):
        logits = stream.k[row, : i + 1, head * KEY_HEADS // HEADS] @ stream.q[row, i, head] * SCALE
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if slopes is not None:
            logits = logits - slopes[head] * (i - np.arange(i + 1))
        if window is not None:
            logits[: max(i - window, 0)] = -np.inf
        found[row, head, i, : i + 1] = np.exp(logits) / (np.exp(logits).sum() + np.exp(sinks[head]))
    return found


def outputs(weights, stream):
    values = np.repeat(stream.v, HEADS // KEY_HEADS, axis=2)
    return np.einsum("bhts,bshd->bthd", weights, values)


@settings(max_examples=settings().max_examples // 3, deadline=None)  # each is a program
@example(sinks=(4.0, -4.0, 0.5, 1.0), window=4, alibi=True, softcap=2.0, counts=[9, 1, 4], seed=3)
@given(
    sinks=st.tuples(*[st.floats(-4, 4)] * HEADS),
    window=st.sampled_from([None, 4]),
    alibi=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_cascade_is_a_softmax_with_one_more_logit(sinks, window, alibi, softcap, counts, seed):
    stream, slopes = Stream.drawn(1, 17, seed), SLOPES if alibi else None
    cascade = Cascade(Full(17)) if window is None else Cascade(Window(1), Window(window - 1))
    found, _ = run(cascade, stream, counts, width=9, slopes=slopes, softcap=softcap, sink_logits=sinks)
    expected = outputs(weights_by_loops(stream, sinks, slopes, softcap, window), stream)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    wrong = outputs(weights_by_loops(stream, [s + 0.1 for s in sinks], slopes, softcap, window), stream)
    assert np.abs(wrong - expected).max() > 1e-4


@pytest.mark.usual("counts1")
@pytest.mark.parametrize("counts", [[1], [5]])
def test_noted_attention_leaves_the_sinks_share_out(counts):
    """What a window notes for the pages behind it: of each token the sum over queries of what they gave it."""
    sinks, stream = (1.0, -1.0, 0.5, 2.0), Stream.drawn(2, 10)
    pages = Pages(4, 16, 2, Representative(2))
    _, state = run(Cascade(Sink(1), Window(12), pages), stream, counts, sink_logits=sinks)
    weights = weights_by_loops(stream, sinks)
    given = weights.sum(axis=2)[:, :, 1:]
    np.testing.assert_allclose(state[1].score[:, :, :9], given, atol=1e-4)
    assert np.all(weights.sum(axis=-1) < 1)
