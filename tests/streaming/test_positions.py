"""Stream positions never run out: millions, billions, and across the wrap of the 32-bit counter."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import ALIBI, GQA, build, random_tokens, read_stream

# the last two wrap the unsigned counter, and the sign of the signed one, in the middle of the stream
STARTS = [0, 4_000_000, 1_000_000_000, 2**32 - 20, 2**31 - 20]
SINKS, WINDOW, LENGTH = 3, 6, 40
FUSED = sj.kv.preset("streaming_llm", sinks=SINKS, window=WINDOW)
PLAIN = sj.kv.Cascade(sj.kv.Sink(SINKS), sj.kv.Window(WINDOW), fuse=False)
CACHES = (FUSED, PLAIN, sj.kv.preset("dense", capacity=LENGTH))


@pytest.mark.quick
def test_init_state_starts_where_it_is_told():
    model = build(GQA)
    for start in [*STARTS, 2**32 + 5, 2**40 + 7]:
        state = sj.init_state(model, FUSED, batch_size=2, position=start)
        assert state.position.tolist() == [start % 2**32] * 2
        assert state.seen.tolist() == [0, 0]


@pytest.mark.usual("8", "alibi")
@pytest.mark.parametrize(("config", "cut"), [(GQA, [1]), (GQA, [8]), (ALIBI, [8])], ids=["1", "8", "alibi"])
def test_a_stream_is_the_same_wherever_it_starts(config, cut):
    """One row for each start, through every kind of cache, from the first token on."""
    model = build(config.replace(num_layers=len(CACHES)) if config is GQA else config)
    caches = CACHES if config is GQA else (FUSED, PLAIN)
    state = sj.init_state(model, caches, batch_size=len(STARTS))
    state = dataclasses.replace(state, position=jnp.array(STARTS, jnp.uint32))
    tokens = np.repeat(random_tokens(1, LENGTH), len(STARTS), axis=0)
    state, logits = read_stream(model, state, tokens, cut)
    assert state.position.tolist() == [(start + LENGTH) % 2**32 for start in STARTS]
    for row in range(1, len(STARTS)):
        np.testing.assert_allclose(logits[row], logits[0], atol=1e-4, rtol=0)


def test_sinks_from_the_start_of_a_stream_serve_a_window_billions_later():
    """Sinks written at position 0, the window at 4e6, at 1e9 and across 2^32, as at the end of one long stream.

    A token's influence through windows ends after layers x window tokens; from there on only the sinks and the last
    tokens count, wherever the stream stands.
    """
    model, layers = build(GQA), GQA.num_layers
    far = [SINKS, 4_000_000, 1_000_000_000, 2**32 - layers * WINDOW - 4, 2**31 - layers * WINDOW - 4]
    seen = [SINKS, 4_000_000, 1_000_000_000, 2**30, 2**30]
    tokens = np.repeat(random_tokens(1, LENGTH), len(far), axis=0)
    state = sj.init_state(model, (FUSED, PLAIN), batch_size=len(far))
    for i in range(SINKS):
        state, _ = sj.step(model, state, tokens[:, i : i + 1])
    state = dataclasses.replace(state, position=jnp.array(far, jnp.uint32), seen=jnp.array(seen, jnp.int32))
    _, logits = read_stream(model, state, tokens[:, SINKS:], [1])
    settled = (layers + 1) * WINDOW
    assert LENGTH - SINKS - settled > 10
    for row in range(1, len(far)):
        np.testing.assert_allclose(logits[row, settled:], logits[0, settled:], atol=1e-4, rtol=0)


@pytest.mark.quick
def test_the_count_of_seen_tokens_saturates_and_the_stream_goes_on():
    model, tokens = build(GQA), random_tokens(1, 20)
    near, _ = read_stream(model, sj.init_state(model, FUSED), tokens[:, :12], [1])
    far = dataclasses.replace(near, seen=jnp.array([2**30 - 3], jnp.int32))
    copy, _ = read_stream(model, sj.init_state(model, FUSED), tokens[:, :12], [1])
    _, expected = read_stream(model, copy, tokens[:, 12:], [1])
    far, logits = read_stream(model, far, tokens[:, 12:], [1])
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert far.seen.tolist() == [2**30]
