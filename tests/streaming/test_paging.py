"""Models that stream over tiers that read only some of what they hold: pages of one length, pages that end where the
content does, clusters. With everything read they are dense, with little they still go on for ever.
"""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.architectures import CASES, changes_with_length, different_layers, tiny_config
from tests.covering import rest_slow
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

ENDS = (3, 7, 11)
CONTENT = {"sinks": 2, "window": 3, "capacity": 96, "page": 4, "top_k": 24, "least": 2}
CLUSTERS = {"segment": 7, "size": 3, "most": 4, "iterations": 2, "block": 7}
ALL_READ = {
    "quest": sj.kv.preset("quest", sinks=2, window=3, capacity=32, page=4, top_k=9),
    "dhsa": sj.kv.preset("dhsa", **CONTENT, context=2, threshold=0.3),
    "sentence_kv": sj.kv.preset("sentence_kv", **CONTENT, ends=ENDS),
    "retro_infer": sj.kv.preset("retro_infer", sinks=1, window=3, capacity=28, retrieve=16, estimate=0, **CLUSTERS),
}
# every kind of positions, heads and soft caps with pages; windows with soft caps, and ALiBi, with the others
QUICK = {
    "quest": ("falcon-40b", "mpt"),
    "dhsa": ("gemma2",),
    "sentence_kv": ("gemma2",),
    "retro_infer": ("falcon-alibi",),
}


@pytest.mark.usual("falcon-alibi-retro_infer", "gemma2-dhsa", "mpt-quest")
@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=() if case in QUICK[name] else pytest.mark.slow)
        for case in CASES
        for name in ALL_READ
    ],
)
def test_with_everything_read_a_stream_is_dense(case, name):
    """Every architecture that loads; layers with windows of their own keep them. Most chunks read the tier."""
    config, cache = different_layers(tiny_config(case)), ALL_READ[name]
    model, tokens = build(config), random_tokens(1, 28) % config.vocab_size
    state, found = read_stream(model, sj.init_state(model, cache), tokens, [7])
    if name == "retro_infer" and any(len(layer) == 3 for layer in state.layers):
        assert cache.tiers[-1].clusters == 16
        assert {int(layer[-1].closed.cursor[0]) for layer in state.layers if len(layer) == 3} == {3}
    if changes_with_length(config):  # which depends on the length of a sequence, and on the span of a cache
        _, expected = sj.step(model, sj.init_state(model, sj.kv.preset("dense", capacity=cache.slots + 1)), tokens)
    else:
        expected = sj.forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


FEW = {"sinks": 1, "window": 3, "capacity": 12, "block": 4}
PAGES = {"page": 3, "top_k": 2}
FEW_READ = {
    "quest": [sj.kv.preset("quest", **FEW, **PAGES)],
    "content": [
        sj.kv.preset("dhsa", **FEW, **PAGES, least=1, context=2, threshold=0.3),
        sj.kv.preset("sentence_kv", **FEW, **PAGES, least=1, ends=ENDS),
    ],
    "retro_infer": [
        sj.kv.preset("retro_infer", **FEW, segment=6, size=3, most=4, iterations=2, retrieve=2, estimate=2)
    ],
}


def held(state: sj.StreamState, row: int) -> list:
    """What the last tier of every layer counts of a row: tokens in each page, or in an open segment."""

    def count(tier):
        if hasattr(tier, "open"):
            return tier.open.filled
        return tier.count if hasattr(tier, "count") else tier.tokens.filled

    return [np.asarray(count(layer[-1]))[row].tolist() for layer in state.layers]


@pytest.mark.usual("content")
@pytest.mark.parametrize("name", rest_slow(FEW_READ, "quest", "content"))
def test_rows_of_a_batch_are_streams_of_their_own(name):
    """Each row stops where it likes, so pages end and segments fill at different times.

    What stands behind a row's tokens in a chunk changes nothing, though it looks like the end of a sentence.
    """
    caches = FEW_READ[name]
    model, tokens = build(GQA.replace(num_layers=len(caches))), random_tokens(3, 40)
    counts = np.array([[7, 8, 1], [2, 0, 8], [8, 8, 8], [3, 5, 8]], np.int32)
    state, starts = sj.init_state(model, caches, 3), np.zeros(3, int)
    together = [[] for _ in range(3)]
    for count in counts:
        chunk = np.full((3, 8), ENDS[1], np.int32)
        for row in range(3):
            chunk[row, : count[row]] = tokens[row, starts[row] : starts[row] + count[row]]
        state, logits = sj.step(model, state, chunk, count)
        for row in range(3):
            together[row].append(np.asarray(logits)[row, : count[row]])
        starts += count
    if name == "retro_infer":
        assert [held(state, row) for row in range(3)] == [[(n - 4) % 6] for n in starts]
    for row in range(3):
        alike, start = sj.init_state(model, caches, 3), 0  # three streams of this row: by the same program
        for count, expected in zip(counts[:, row], together[row], strict=True):
            chunk = np.full((3, 8), 12, np.int32)
            chunk[:, :count] = tokens[row, start : start + count]
            alike, logits = sj.step(model, alike, chunk, np.full(3, count))
            np.testing.assert_allclose(np.asarray(logits)[0, :count], expected, atol=1e-5)
            start += count
        assert held(state, row) == held(alike, 0)


# when 104 are read, 8 are in the window; the others fill whole pages or segments, of which the last are left
@pytest.mark.parametrize(
    ("tier", "oldest"),
    [(sj.kv.Pages(4, 16, 5), 80), (sj.kv.Clusters(8, 16, 4, 1, size=4, most=4, block=8), 80)],
    ids=["pages", "clusters"],
)
def test_a_stream_goes_on_far_beyond_what_a_tier_holds(tier, oldest):
    """The state keeps its size, and the oldest tokens go, as a whole page or segment: then, and not before."""
    model = build(GQA.replace(num_layers=1))
    cache = sj.kv.Cascade(sj.kv.Window(8), tier)
    tokens, other = random_tokens(1, 112), random_tokens(1, 112, seed=1)
    other[:, oldest:] = tokens[:, oldest:]
    changed = other.copy()
    changed[:, oldest : oldest + 4] = (changed[:, oldest : oldest + 4] + 1) % 40
    (state, first), (_, same), (_, moved) = (
        read_stream(model, sj.init_state(model, cache), row, [8]) for row in (tokens, other, changed)
    )
    assert state.cache_bytes == sj.init_state(model, cache).cache_bytes
    np.testing.assert_allclose(first[:, -8:], same[:, -8:], atol=1e-5)
    assert np.abs(first[:, -8:] - moved[:, -8:]).max() > 1e-4


def test_pages_end_where_the_sentences_of_a_text_do():
    """Behind sinks and a window; the ids come through both."""
    model = build(GQA.replace(num_layers=1, vocab_size=259))
    text = np.frombuffer(b"..One. Two three?\nFour! five", np.uint8).astype(np.int32)[None]
    cache = sj.kv.preset("sentence_kv", sinks=2, window=3, capacity=64, page=8, top_k=2)
    state = sj.read(model, sj.init_state(model, cache), text, 4)
    # the window holds "ive"; " Two three?" is longer than a page
    assert held(state, 0) == [[[len("One."), len(" Two thr"), len("ee?"), 1, len("Four!"), len(" f"), 0, 0]]]


@pytest.mark.usual("content")
@pytest.mark.parametrize("name", rest_slow(FEW_READ, "quest", "content"))
def test_a_saved_stream_is_the_same(tmp_path, name):
    """With the program of the rows above."""
    caches = FEW_READ[name]
    model, tokens = build(GQA.replace(num_layers=len(caches))), random_tokens(3, 40)
    state, whole = sj.init_state(model, caches, 3), np.full(3, 8, np.int32)
    for start in range(0, 32, 8):
        state, _ = sj.step(model, state, tokens[:, start : start + 8], whole)
    save_stream(state, tmp_path / "stream")
    restored = load_stream(tmp_path / "stream", sj.init_state(model, caches, 3))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
