"""Models that stream over tokens kept by a score: with everything behind them they are dense, saved they go on."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.description import describe_cache
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.streaming.tiny_models import ALIBI, GQA, build, random_tokens, read_stream

CACHE = sj.kv.preset("h2o", window=4, size=6, every=4)


def test_with_everything_behind_it_a_stream_is_dense():
    model, tokens = build(ALIBI.replace(num_layers=1)), random_tokens(1, 40)
    everything = sj.kv.Cascade(sj.kv.Window(3), sj.kv.Scored(5, sj.kv.SnapKV(2, 3), every=4), sj.kv.Full(40))
    _, logits = read_stream(model, sj.init_state(model, everything), tokens, [7, 1])
    np.testing.assert_allclose(logits[0], sj.forward(model, tokens)[0], atol=1e-4)


@pytest.mark.slow
def test_a_stream_is_saved_and_goes_on(tmp_path):
    """In the middle of a block, to the bit."""
    model, tokens = build(GQA), random_tokens(2, 30)
    state, _ = read_stream(model, sj.init_state(model, CACHE, batch_size=2), tokens[:, :21], [7])
    save_stream(state, tmp_path / "stream")
    loaded = load_stream(tmp_path / "stream", sj.init_state(model, CACHE, batch_size=2))
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    (_, expected), (_, found) = (read_stream(model, each, tokens[:, 21:], [1]) for each in (state, loaded))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.quick
def test_bytes_are_what_the_slots_take():
    """Keys and values, a position, a note and whether there is a token, for each head; and the next block's slots."""
    assert CACHE.slots == 14
    spec = sj.kv.KVSpec(3, 2, 8, np.dtype(np.float32), 2)
    _, scored = CACHE.init(spec)
    a_slot = 2 * 8 * 4 + 4 + 4 + 1
    counters = 3 * 4 * 4  # filled, taken, clock, now
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(scored)) == 3 * 2 * (10 * a_slot + 4 * 4) + counters
    assert describe_cache(CACHE) == "Window(4) > Scored(6 by H2O(), every 4)"
