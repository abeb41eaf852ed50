"""What a block passes on against plain lists, however a stream is cut, and of a whole prompt at once."""

import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import H2O, BlendedBounds, Cascade, Coarse, Full, KNorm, LagKV, Pages, Sink, StaticEviction, Window
from tests.kv.tier_streams import FREQUENCIES, KEY_HEADS, SCALE, Stream, run
from tests.oracles import scored as oracle
from tests.streaming.compacting.test_compact import DENSE, LENGTH, ONE_LAYER, QUERIES, shares
from tests.streaming.tiny_models import build, parts_of_layers, random_tokens, read_stream

SINKS, WINDOW, SIZE, EVERY = 2, 3, 3, 5


@pytest.mark.usual("score0-mass-True")
@pytest.mark.parametrize(
    ("score", "rank", "together"), [(H2O(), oracle.mass, True), (KNorm(), oracle.short_keys, False)]
)
def test_a_stream_token_by_token(score, rank, together):
    """Outputs, and what the tier behind gets: token by token, and of two rows in chunks that end anywhere."""
    stream = Stream.drawn(2, 45)
    rule = oracle.Rule(KEY_HEADS, SINKS, WINDOW, SIZE, EVERY, rank, SCALE, None, FREQUENCIES, together=together)
    expected, places = [], []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = oracle.Once(rule)
        expected.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
        places.append([[e[2] for e in head] for head in lists.kept])
    eviction = StaticEviction(SIZE, score, per_head=not together, every=EVERY)
    cascade = Cascade(Sink(SINKS, reach=10**6), Window(WINDOW), eviction, Full(40))
    for counts in ([1], [(3, 1), (1, 6)]):
        found, (*_, waits, full) = run(cascade, stream, counts, width=6, frequencies=FREQUENCIES)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        for row in range(2):
            for head in range(1 if together else KEY_HEADS):
                passed = np.asarray(full.position)[row, head, : full.filled[row]].tolist()
                held = np.asarray(waits.slots.position)[row, head][np.asarray(waits.slots.valid)[row, head]]
                assert passed + sorted(held.tolist()) == places[row][head]
        assert int(full.filled.min()) > 15


def test_a_prompt_loses_what_its_last_queries_pass_by():
    """MPCache at a prompt's end: a share of a layer's tokens lies in pages, in order; a stream goes on."""
    model, tokens = build(ONE_LAYER), random_tokens(2, LENGTH)
    state, found = sj.read(model, sj.init_state(model, DENSE, 2), tokens, 16), parts_of_layers(model, tokens)
    cache = sj.kv.preset(
        "mpcache", sinks=2, window=4, keep=0.4, every=5, capacity=32, page=4, clusters=2, top_k=3
    )  # fmt: skip
    assert cache.tiers[2:] == (
        StaticEviction(2, H2O(), every=5), Pages(4, 32, 3, BlendedBounds(0.6), coarse=Coarse(2))
    )  # fmt: skip
    new = sj.compact(model, state, cache, tokens[:, -QUERIES:])
    scale, count = model.config.blocks[0].mixer.softmax_scale, LENGTH - 6
    most = count // 5 * 2 + 1
    for (q, k, v), layer in zip(found, new.layers, strict=True):
        ring = layer[3].tokens
        for row in range(2):
            worth = shares(q[row], k[row], scale, QUERIES).sum(axis=(0, 1, 2))[2 : LENGTH - 4]
            best = sorted((np.argsort(-worth)[:most] + 2).tolist())
            assert int(ring.filled[row]) == most
            assert np.asarray(ring.position)[row, 0, :most].tolist() == best
            for mine, theirs in ((ring.k, k), (ring.v, v)):
                kept = np.swapaxes(np.asarray(mine)[row, :, :most], 0, 1)
                np.testing.assert_allclose(kept, theirs[row, best], atol=1e-4)
    _, logits = read_stream(model, new, random_tokens(2, 20, seed=1), [1])
    assert np.isfinite(logits).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticEviction(9, H2O(), every=8), "size is 9: a block has 8 tokens"),
        (lambda: StaticEviction(4, H2O(), distance=3), "it takes no distance"),
        (lambda: StaticEviction(4, LagKV(), every=64), "asks its score once"),
        (lambda: Pages(4, 32, 3, coarse=Coarse(2)), "Pages.coarse is for BlendedBounds"),
        (lambda: Pages(4, 32, 3, BlendedBounds(), coarse=Coarse(1)), "leaves 1 runs of 2 pages, and top_k is 3"),
        (lambda: Coarse(0), "Coarse.top_k is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_it_is_never_the_last_tier():
    with pytest.raises(ValueError, match="put a tier behind it"):
        run(Cascade(Window(4), StaticEviction(2, H2O(), every=4)), Stream.drawn(1, 3), [1])
