"""Heads that share one pool of slots, against plain lists; the same however a stream is cut; bytes are the total's."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from streamjax.kv import H2O, Anchors, Cascade, Full, Int, KNorm, LagKV, Pooled, Scored, Sink, SnapKV, Window
from tests.kv.tier_streams import FREQUENCIES, KEY_HEADS, SCALE, SLOPES, Stream, gradients, run, spec
from tests.oracles import pooled as oracle
from tests.oracles import scored
from tests.oracles.codecs import stored

SINKS, WINDOW, SIZE, EVERY, LENGTH = 2, 3, 6, 4, 41
CASES = {
    "h2o": (H2O(), scored.mass, 0.2, None, "rope"),
    "snapkv": (SnapKV(window=3, kernel=3), scored.newest(3, 3), 0.0, None, "rope"),
    "knorm": (KNorm(), scored.short_keys, 0.5, 9, "rope"),
    "lagkv": (LagKV(), scored.lagged, 0.25, None, "alibi"),
}


def drawn(rows: int = 2) -> Stream:
    """One head's keys are longer than the other's, and its attention less even."""
    stream = Stream.drawn(rows, LENGTH)
    stream.k[:, :, 0] *= 1.6
    return stream


def cascade(score, floor, **options):
    pool = Pooled(SIZE, score, every=EVERY, floor=floor, **options)
    return Cascade(Sink(SINKS, reach=10**6), Window(WINDOW), pool)


def kept(state) -> list:
    slots = state[-1].slots
    position, valid = np.asarray(slots.position), np.asarray(slots.valid)
    return [[sorted(position[b, 0][head].tolist()) for head in valid[b]] for b in range(len(valid))]


@pytest.mark.usual("h2o")
@pytest.mark.parametrize("name", [*list(CASES)[:3], pytest.param("lagkv", marks=pytest.mark.slow)])
def test_a_stream_token_by_token(name):
    score, rank, floor, distance, positions = CASES[name]
    slopes, frequencies = SLOPES if positions == "alibi" else None, FREQUENCIES if positions == "rope" else None
    stream, out, places = drawn(), [], []
    rule = scored.Rule(KEY_HEADS, SINKS, WINDOW, SIZE, EVERY, rank, SCALE, slopes, frequencies, distance)
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = oracle.Stream(rule, round(1000 * floor))
        out.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
        places.append([[e[2] for e in head] for head in lists.kept])
    counts = [1] if distance else [(3, 1), (1, 6)]  # at a fixed distance the result depends on the cut a little
    found, state = run(
        cascade(score, floor, distance=distance), stream, counts, width=6, slopes=slopes, frequencies=frequencies
    )
    np.testing.assert_allclose(found, np.array(out), atol=1e-4)
    assert kept(state) == places
    assert any(len(first) != len(second) for first, second in places) or name == "lagkv"


def test_a_pool_in_codes_token_by_token():
    """Keys are not rotated, so that lists hold the same codes to the last bit."""
    stream = drawn()
    rule = scored.Rule(
        KEY_HEADS, SINKS, WINDOW, SIZE, EVERY, scored.short_keys, SCALE, coded=lambda row: stored(row, 4)
    )  # fmt: skip
    expected, places = [], []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = oracle.Stream(rule, 200)
        expected.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
        places.append([[e[2] for e in head] for head in lists.kept])
    mine = cascade(KNorm(), 0.2, codec=Int(4, group=6))
    found, state = run(mine, stream, [1], width=6)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-4)
    assert kept(state) == places
    slots = KEY_HEADS * (SIZE + EVERY)
    assert state[-1].slots.k.codes.shape == (2, 1, slots // 2, 6)
    _, cut = run(mine, stream, [(3, 1), (1, 6)], width=6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def one_by_one(name):
    """Outputs and the last state of a stream on whose way the counter of positions wraps."""
    mine = cascade(CASES[name][0], CASES[name][2])
    return run(mine, drawn(), [1], width=6, start=2**32 - 20, frequencies=FREQUENCIES)


@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.sampled_from(["h2o", "snapkv"]), st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_a_stream_is_the_same_however_it_is_cut(name, counts):
    mine = cascade(CASES[name][0], CASES[name][2])
    found, state = run(mine, drawn(), counts, width=6, start=2**32 - 20, frequencies=FREQUENCIES)
    expected, like = one_by_one(name)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert kept(state) == kept(like)


@pytest.mark.slow
def test_a_pool_without_a_choice_is_what_every_head_keeps_by_itself():
    stream = drawn()
    own, _ = run(Cascade(Scored(SIZE, KNorm(), every=EVERY)), stream, [6], width=6)
    pooled, _ = run(Cascade(Pooled(SIZE, KNorm(), every=EVERY, floor=1.0)), stream, [6], width=6)
    np.testing.assert_allclose(pooled, own, atol=1e-5)


@pytest.mark.slow
def test_gradients_flow_through_the_pool():
    for name, x in zip("qkv", gradients(cascade(KNorm(), 0.2), Stream.drawn(1, 24), 24), strict=True):
        assert np.isfinite(x).all(), name
        assert np.abs(x).max() > 1e-3, name


@pytest.mark.quick
def test_bytes_are_those_of_the_total():
    """Keys, values and positions of K (size + every) slots, a mask and a note for each head and slot."""
    shapes = jax.eval_shape(lambda: Pooled(SIZE, H2O(), every=EVERY).init(spec())).slots
    pool, width = KEY_HEADS * (SIZE + EVERY), spec().head_dim
    assert shapes.k.shape == shapes.v.shape == (1, 1, pool, width)
    assert shapes.position.shape == (1, 1, pool)
    assert shapes.valid.shape == shapes.note.shape == (1, KEY_HEADS, pool)


@pytest.mark.quick
def test_what_does_not_fit_is_refused():
    for make, message in (
        (lambda: Cascade(Pooled(4, KNorm()), Full(9)), "Pooled must be the last tier of a Cascade: its heads lose"),
        (lambda: Pooled(4, KNorm(), floor=1.2), "Pooled.floor is 1.2: it must be a number from 0 to 1"),
        (lambda: Pooled(4, KNorm(), merge=Anchors()), "Pooled chooses over all heads: it takes no merge rule"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
