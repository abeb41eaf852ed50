"""Models that stream over pages that end where the content does, and the ids that reach those that ask for them."""

import re

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.architectures import CASES, changes_with_length, tiny_config
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

ENDS = (3, 7, 11)
QUICK = ("llama", "gemma2", "falcon-40b", "mpt")  # one of each kind; the others are slow together
SMALL = {"sinks": 2, "window": 3, "capacity": 96, "page": 4, "top_k": 24, "least": 2}
OPTIONS = {"dhsa": {"context": 2, "threshold": 0.3}, "sentence_kv": {"ends": ENDS}}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(pytest.param(case, "dhsa", marks=() if case in QUICK else pytest.mark.slow) for case in CASES),
        *(pytest.param(case, "sentence_kv", marks=() if case == "gemma2" else pytest.mark.slow) for case in QUICK),
    ],
)
def test_with_every_page_read_a_stream_is_dense(case, name):
    """Every architecture that loads; layers with windows of their own keep them."""
    config = tiny_config(case)
    model, tokens = build(config), random_tokens(1, 28) % config.vocab_size
    cache = sj.kv.preset(name, **SMALL, **OPTIONS[name])
    _, found = read_stream(model, sj.init_state(model, cache), tokens, [7])
    if changes_with_length(config):  # which depends on the length of a sequence, and on the span of a cache
        _, expected = sj.step(model, sj.init_state(model, sj.kv.preset("dense", capacity=cache.slots + 1)), tokens)
    else:
        expected = sj.forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def pages_of(state):
    """Tokens in each page of the last tier, for every layer."""
    return [np.asarray(layer[-1].count).tolist() for layer in state.layers]


def test_rows_of_a_batch_are_streams_of_their_own():
    """Each row ends its pages where its own tokens say; padding, though it looks like an end, says nothing."""
    model, tokens = build(GQA), random_tokens(3, 32)
    few = {"sinks": 1, "window": 3, "capacity": 12, "page": 3, "top_k": 2, "block": 4}
    caches = [sj.kv.preset(name, **{"least": 1, **few}, **OPTIONS[name]) for name in ("dhsa", "sentence_kv")]
    counts = np.array([[7, 8, 1], [2, 0, 8], [8, 8, 8], [3, 5, 8]], np.int32)
    state, starts = sj.init_state(model, caches, 3), np.zeros(3, int)
    together = [[] for _ in range(3)]
    for count in counts:
        chunk = np.full((3, 8), ENDS[0], np.int32)
        for row in range(3):
            chunk[row, : count[row]] = tokens[row, starts[row] : starts[row] + count[row]]
        state, logits = sj.step(model, state, chunk, count)
        for row in range(3):
            together[row].append(np.asarray(logits)[row, : count[row]])
        starts += count
    for row in range(3):
        alone, start = sj.init_state(model, caches), 0
        for count, expected in zip(counts[:, row], together[row], strict=True):
            chunk = np.full((1, 8), 12, np.int32)
            chunk[:, :count] = tokens[row, start : start + count]
            alone, logits = sj.step(model, alone, chunk, count[None])
            np.testing.assert_allclose(np.asarray(logits)[0, :count], expected, atol=1e-5)
            start += count
        assert [layer[row] for layer in pages_of(state)] == [layer[0] for layer in pages_of(alone)]


def test_pages_end_where_the_sentences_of_a_text_do():
    """Behind sinks and a window; the ids come through both."""
    model = build(GQA.replace(num_layers=1, vocab_size=259))
    text = np.frombuffer(b"..One. Two three?\nFour! five", np.uint8).astype(np.int32)[None]
    cache = sj.kv.preset("sentence_kv", sinks=2, window=3, capacity=64, page=8, top_k=2)
    state = sj.read(model, sj.init_state(model, cache), text, 8)
    # the window holds "ive"; " Two three?" is longer than a page
    assert pages_of(state)[0] == [[[len("One."), len(" Two thr"), len("ee?"), 1, len("Four!"), len(" f"), 0, 0]]]


def test_a_decode_step_keeps_its_donated_caches_in_place():
    """As for pages of one length: every byte is aliased and nothing as large as a cache is copied."""
    model = build(GQA.replace(head_dim=32, num_layers=1))
    pages = sj.kv.ContentPages(16, 1024, 8, sj.kv.EndTokens(ENDS))
    state = sj.init_state(model, sj.kv.Cascade(sj.kv.Window(32), pages))
    size = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    compiled = sj.step.lower(model, state, np.zeros((1, 1), np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < size / 2
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|concatenate|pad|convert)\(", compiled.as_text())
    assert made, "the pattern should find some instructions"
    assert max(4 * np.prod([int(n) for n in shape.split(",")]) for shape in made) < size / 2


@pytest.mark.quick
def test_only_caches_that_ask_get_ids():
    asking, other = sj.kv.preset("sentence_kv"), sj.kv.preset("dhsa")
    assert asking.needs_ids
    assert not other.needs_ids
    assert sj.kv.HeadGroups(((0,), other), ((1,), asking)).needs_ids
    spec = sj.kv.KVSpec(1, 1, 2, np.dtype(np.float32))
    shapes = [jax.eval_shape(lambda cache=cache: cache.tiers[1].init(spec)) for cache in (asking, other)]
    assert shapes[0].ids.shape == (1, 1, 64)
    assert shapes[1].ids is None


@pytest.mark.quick
def test_ids_are_named_in_one_word():
    assert sj.kv.parse_preset("sentence_kv:ends=13+30,page=64") == ("sentence_kv", {"ends": (13, 30), "page": 64})
    with pytest.raises(ValueError, match="cache 'sentence_kv': ends must be a number, not '13\\+x'"):
        sj.kv.parse_preset("sentence_kv:ends=13+x")
