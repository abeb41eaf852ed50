"""Models that stream over clusters: with every cluster read they are dense, with few they still go on for ever."""

import re

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.architectures import CASES, changes_with_length, tiny_config
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

SMALL = {"sinks": 1, "window": 3, "segment": 6, "size": 3, "most": 4, "iterations": 2}
FIRST = ("llama", "gemma2", "falcon-alibi")  # one of each kind of positions, heads and soft caps


@pytest.mark.parametrize("case", [*FIRST, *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x not in FIRST)])
def test_with_every_cluster_read_a_stream_is_dense(case):
    """Every architecture that loads; layers with windows of their own keep them. Two of four chunks read clusters."""
    config = tiny_config(case)
    model, tokens = build(config), random_tokens(1, 28) % config.vocab_size
    sizes = {"sinks": 1, "window": 3, "segment": 7, "size": 3, "most": 4, "iterations": 2, "block": 7}
    cache = sj.kv.preset("retro_infer", **sizes, capacity=28, retrieve=16, estimate=0)
    assert cache.tiers[-1].clusters == 16
    state, found = read_stream(model, sj.init_state(model, cache), tokens, [7])
    closed = [layer[-1].closed.cursor.tolist() for layer in state.layers if len(layer) == 3]
    assert closed == [[3]] * len(closed)
    if changes_with_length(config):  # which depends on the length of a sequence, and on the span of a cache
        _, expected = sj.step(model, sj.init_state(model, sj.kv.preset("dense", capacity=cache.slots + 1)), tokens)
    else:
        expected = sj.forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_rows_of_a_batch_are_streams_of_their_own():
    """Rows fill their segments at different times; what stands behind their tokens in a chunk changes nothing."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(3, 40)
    cache = sj.kv.preset("retro_infer", **SMALL, capacity=12, retrieve=2, estimate=2, block=4)
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
    assert [int(n) for n in state.layers[0][-1].open.filled] == [(n - 4) % 6 for n in starts]
    for row in range(3):
        alone, start = sj.init_state(model, cache), 0
        for count, expected in zip(counts[:, row], together[row], strict=True):
            chunk = np.full((1, 8), 11, np.int32)
            chunk[:, :count] = tokens[row, start : start + count]
            alone, logits = sj.step(model, alone, chunk, count[None])
            np.testing.assert_allclose(np.asarray(logits)[0, :count], expected, atol=1e-5)
            start += count


def test_a_stream_goes_on_far_beyond_its_clusters():
    """The state keeps its size, and the oldest segment goes when a new one is full: not before, and as a whole."""
    model = build(GQA.replace(num_layers=1))
    cache = sj.kv.Cascade(sj.kv.Window(8), sj.kv.Clusters(8, 16, 4, 1, size=4, most=4, block=8))
    tokens, other = random_tokens(1, 112), random_tokens(1, 112, seed=1)
    # when 104 are read, 8 are in the window and 96 were in twelve segments, of which the last two are left: from 80 on
    other[:, 80:] = tokens[:, 80:]
    changed = other.copy()
    changed[:, 80:84] = (changed[:, 80:84] + 1) % 40
    (state, first), (_, same), (_, moved) = (
        read_stream(model, sj.init_state(model, cache), row, [8]) for row in (tokens, other, changed)
    )
    assert state.cache_bytes == sj.init_state(model, cache).cache_bytes
    np.testing.assert_allclose(first[:, -8:], same[:, -8:], atol=1e-5)
    assert np.abs(first[:, -8:] - moved[:, -8:]).max() > 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_keeps_its_donated_clusters_in_place(untyped, batch):
    """Every byte of the state is aliased, and no instruction copies the tokens, in the branch that clusters neither."""
    model = build(GQA.replace(head_dim=32, num_layers=1))
    cache = sj.kv.Cascade(sj.kv.Window(32), sj.kv.Clusters(32, 1024, 4, 4))
    state = sj.init_state(model, cache, batch_size=batch)
    leaves = jax.tree.leaves(state)
    tokens = max(leaf.nbytes for leaf in leaves)
    compiled = sj.step.lower(model, state, np.zeros((batch, 1), np.int32)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in leaves)
    assert compiled.memory_analysis().temp_size_in_bytes < tokens
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|concatenate|pad|convert)\(", compiled.as_text())
    assert made, "the pattern should find some instructions"
    assert max(4 * np.prod([int(n) for n in shape.split(",")]) for shape in made) < tokens / 2
