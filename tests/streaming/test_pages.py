"""Models that stream over pages: with every page read they are dense, with few they still go on for ever."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.saved_streams import load_stream, save_stream
from tests.architectures import CASES, changes_with_length, tiny_config
from tests.streaming.tiny_models import GQA, build, random_tokens

FIRST = ("llama", "gemma2", "falcon-40b", "mpt")  # one of each kind of positions, heads and soft caps


@pytest.mark.parametrize("case", [*FIRST, *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x not in FIRST)])
def test_with_every_page_read_a_stream_is_dense(case):
    """Every architecture that loads; layers with windows of their own keep them."""
    config = tiny_config(case)
    model, tokens = build(config), random_tokens(1, 28) % config.vocab_size
    cache = sj.kv.preset("quest", sinks=2, window=3, capacity=32, page=4, top_k=9)
    paged, first = sj.step(model, sj.init_state(model, cache), tokens[:, :27])
    _, last = sj.step(model, paged, tokens[:, 27:])
    if changes_with_length(config):  # which depends on the length of a sequence, and on the span of a cache
        _, expected = sj.step(model, sj.init_state(model, sj.kv.preset("dense", capacity=cache.slots + 1)), tokens)
    else:
        expected = sj.forward(model, tokens)
    np.testing.assert_allclose(np.concatenate((first, last), 1), expected, atol=1e-4, rtol=0)


def test_rows_of_a_batch_are_streams_of_their_own():
    """Each row stops where it likes; what stands behind its tokens in a chunk changes nothing, blocks included."""
    model, tokens = build(GQA), random_tokens(3, 40)
    cache = sj.kv.preset("quest", sinks=1, window=3, capacity=12, page=3, top_k=2, block=4)
    counts = np.array([[7, 8, 1], [2, 0, 8], [8, 8, 8], [3, 5, 8]], np.int32)
    state, starts = sj.init_state(model, cache, 3), np.zeros(3, int)
    together = [[] for _ in range(3)]
    for count in counts:
        chunk = np.full((3, 8), 7, np.int32)
        for row in range(3):
            chunk[row, : count[row]] = tokens[row, starts[row] : starts[row] + count[row]]
        state, logits = sj.step(model, state, chunk, count)
        for row in range(3):
            together[row].append(np.asarray(logits)[row, : count[row]])
        starts += count
    for row in range(3):
        alone, start = sj.init_state(model, cache), 0
        for count, expected in zip(counts[:, row], together[row], strict=True):
            chunk = np.full((1, 8), 11, np.int32)
            chunk[:, :count] = tokens[row, start : start + count]
            alone, logits = sj.step(model, alone, chunk, count[None])
            np.testing.assert_allclose(np.asarray(logits)[0, :count], expected, atol=1e-5)
            start += count


def test_a_stream_goes_on_far_beyond_its_pages():
    """The state keeps its size, and the oldest tokens are really gone: streams that differ only there agree."""
    model = build(GQA.replace(num_layers=1))
    cache = sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(4, 16, 5))
    tokens, other = random_tokens(1, 200), random_tokens(1, 200, seed=1)
    other[:, -21:] = tokens[:, -21:]
    states = [sj.read(model, sj.init_state(model, cache), row[:, :-1], 8) for row in (tokens, other)]
    assert states[0].cache_bytes == sj.init_state(model, cache).cache_bytes
    logits = [sj.step(model, state, tokens[:, -1:])[1] for state in states]
    np.testing.assert_allclose(*logits, atol=1e-5)
    changed = other.copy()
    changed[:, -20] = (changed[:, -20] + 1) % 40
    _, moved = sj.step(model, sj.read(model, sj.init_state(model, cache), changed[:, :-1], 8), tokens[:, -1:])
    assert np.abs(np.asarray(moved) - logits[0]).max() > 1e-4


SMALL = {"sinks": 1, "window": 3}


@pytest.mark.parametrize(
    "cache",
    [
        sj.kv.preset("quest", **SMALL, capacity=16, page=4, top_k=2),
        sj.kv.preset("dhsa", **SMALL, capacity=16, page=4, top_k=2, context=2, threshold=0.3, least=2),
        sj.kv.preset("retro_infer", **SMALL, capacity=12, segment=6, retrieve=2, estimate=2, size=3, most=4),
    ],
    ids=["quest", "dhsa", "retro_infer"],
)
def test_a_saved_stream_goes_on(tmp_path, cache):
    model, tokens = build(GQA), random_tokens(2, 30)
    state = sj.read(model, sj.init_state(model, cache, 2), tokens[:, :29], 8)
    save_stream(state, tmp_path / "stream")
    restored = load_stream(tmp_path / "stream", sj.init_state(model, cache, 2))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    np.testing.assert_array_equal(sj.step(model, restored, tokens[:, 29:])[1], sj.step(model, state, tokens[:, 29:])[1])
