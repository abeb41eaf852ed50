"""What becomes of tokens that lose, against plain lists, for every merge rule; what does not depend on cuts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from streamjax.kv import (
    H2O,
    Anchors,
    Cascade,
    Convolved,
    Full,
    Gaussian,
    Int,
    IntoFollowing,
    Kernels,
    KNorm,
    NearestAbove,
    Scored,
    Sink,
    Window,
    ZeroClass,
)
from streamjax.kv.codecs import slots
from streamjax.kv.merging.merge import Side
from tests.kv.tier_streams import FREQUENCIES, KEY_HEADS, SCALE, WIDTH, Stream, gradients, run, spec, update
from tests.oracles import merging as oracle
from tests.oracles import scored
from tests.oracles.codecs import stored

SINKS, WINDOW, SIZE, EVERY, LENGTH = 2, 3, 7, 4, 37
START = 2**32 - 20
DRAWN = np.random.default_rng(8)
KERNEL, BIAS = DRAWN.standard_normal((4, 2 * WIDTH, 3)), DRAWN.standard_normal(4)
RULES = {
    "d2o": (NearestAbove(momentum=0.3), oracle.nearest_above(0.3)),
    "kvmerger": (Gaussian(threshold=-0.2), oracle.gaussian(-0.2)),
    "elastic cache": (Anchors(), oracle.anchors),
    "ems": (ZeroClass(threshold=0.1), oracle.zero_class(0.1)),
    "cam": (IntoFollowing(count=3, seed=4), oracle.into_following(3, 4)),
    "lococo": (Convolved(kernels=Kernels.from_arrays(KERNEL, BIAS, 0.4, "whose")), oracle.convolved(KERNEL, BIAS, 0.4)),
    "d2o, turned": (NearestAbove(turned=True), oracle.nearest_above(0.7)),
}


dense = jax.jit(slots.dense)


def front(merge, **options):
    """Sinks and a window, before one of the rules and before codes: the others' tier stands alone."""
    return (SINKS, WINDOW) if merge == RULES["d2o"][0] or "codec" in options or "coded" in options else (0, 0)


def cascade(merge, **options):
    tier = Scored(SIZE, H2O(), every=EVERY, merge=merge, **options)
    sinks, window = front(merge, **options)
    return Cascade(Sink(sinks, reach=10**6), Window(window), tier) if window else Cascade(tier)


def rule(merge, **options):
    sizes = *front(merge, **options), SIZE, EVERY
    return scored.Rule(KEY_HEADS, *sizes, scored.mass, SCALE, None, FREQUENCIES, **options)


def by_lists(rule, join, stream, turned=False):
    rows = []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = oracle.Stream(rule, join, turned)
        rows.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
    return np.array(rows)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "distance", "together"),
    [
        *((name, None, False) for name in list(RULES)[:6]),
        pytest.param("d2o, turned", None, False, marks=SLOW),
        pytest.param("kvmerger", 9, False, marks=SLOW),
        pytest.param("elastic cache", None, True, marks=SLOW),
    ],
)
def test_a_stream_token_by_token(name, distance, together):
    merge, join = RULES[name]
    stream = Stream.drawn(2, LENGTH)
    lists = rule(merge, distance=distance, together=together)
    out = by_lists(lists, join, stream, merge.turned)
    mine = cascade(merge, per_head=not together, distance=distance)
    # at a fixed distance what leaves the window is seen at its true one until its chunk is stored
    counts = [1] if distance else [(3, 1), (1, 6)]
    found, _ = run(mine, stream, counts, width=6, frequencies=FREQUENCIES)
    np.testing.assert_allclose(found, out, atol=2e-4)
    dropped = by_lists(lists, lambda *_: None, stream)
    assert np.abs(dropped - out).max() > 1e-2


@functools.cache
def one_by_one(name):
    """Outputs and the last state of a stream on whose way the counter of positions wraps."""
    return run(cascade(RULES[name][0]), Stream.drawn(2, LENGTH), [1], width=6, start=START, frequencies=FREQUENCIES)


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.sampled_from([name for name in RULES if name != "d2o, turned"]),
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
)
def test_a_stream_is_the_same_however_it_is_cut(name, counts):
    mine, stream = cascade(RULES[name][0]), Stream.drawn(2, LENGTH)
    found, state = run(mine, stream, counts, width=6, start=START, frequencies=FREQUENCIES)
    expected, like = one_by_one(name)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=1e-4)


@pytest.mark.parametrize("name", ["elastic cache", pytest.param("cam", marks=SLOW), pytest.param("d2o", marks=SLOW)])
def test_what_has_come_together_is_coded_again(name):
    """Averages differ in their last bits, and so now and then a code by one.

    Tokens of a chunk see each other as they were before they were coded, so of another cut another token may stay.
    """
    merge, join = RULES[name]
    stream = Stream.drawn(2, LENGTH)
    mine = cascade(merge, codec=Int(4, group=6))
    found, state = run(mine, stream, [1], width=6, frequencies=FREQUENCIES)
    coded = by_lists(rule(merge, coded=lambda row: stored(row, 4).astype(np.float64)), join, stream)
    exact = by_lists(rule(merge, coded=None), join, stream)
    off = np.abs(found - coded)
    assert np.quantile(off, 0.9) < 1e-3
    assert np.quantile(np.abs(coded - exact), 0.5) > 3e-3
    _, like = run(mine, stream, [(3, 1), (1, 6)], width=6, frequencies=FREQUENCIES)
    same = np.isclose(dense(state[-1].slots.k), dense(like[-1].slots.k), atol=0.5).all(axis=-1)
    assert same.mean() > 0.9


@SLOW
def test_gradients_flow_through_what_was_merged():
    stream = Stream.drawn(1, 24)
    for name, x in zip("qkv", gradients(cascade(Anchors()), stream, 24), strict=True):
        assert np.isfinite(x).all(), name
        assert np.abs(x).max() > 1e-3, name


def test_the_gradient_of_a_convolution_over_no_token_is_zero():
    """A window that is as long as `every` passes nothing on at the first choice."""
    none = jnp.zeros((1, 1, 6), bool)
    empty = Side(*[jnp.zeros((1, 1, 6, 4))] * 2, none.astype(jnp.uint32), none, none.astype(jnp.float32))

    def kept(memory):
        return sum(jnp.sum(x) for x in Convolved().merged(empty, empty, memory, None)[:2])

    slopes = jax.jit(jax.grad(kept))((jnp.ones((1, 1, 3, 8, 3)), jnp.ones((1, 1, 3)), jnp.full((1, 1, 1), 0.5)))
    assert all((x == 0).all() for x in slopes)


def test_a_decode_step_copies_no_buffer():
    """Keys and values pass a branch at every token, and are copied inside of it alone, where tokens are merged."""
    mine, one = Cascade(Window(8), Scored(448, H2O(), merge=Gaussian())), spec()
    state = jax.eval_shape(lambda: mine.init(one))
    q = jax.ShapeDtypeStruct((1, 1, one.kv_heads * one.group, one.head_dim), np.float32)
    k = jax.ShapeDtypeStruct((1, 1, one.kv_heads, one.head_dim), np.float32)
    position, valid = jax.ShapeDtypeStruct((1, 1), np.uint32), jax.ShapeDtypeStruct((1, 1), bool)
    seen = jax.ShapeDtypeStruct((1,), np.int32)
    text = update.lower(mine, state, q, k, k, None, position, seen, valid).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    buffer = rf"= f32\[1,{KEY_HEADS},512,{one.head_dim}\]\S* "
    assert re.search(buffer, entry)
    assert not re.search(buffer + r"copy\(", entry)


@pytest.mark.quick
def test_what_does_not_fit_is_refused():
    merging = Scored(4, KNorm(), merge=Gaussian())
    for make, message in (
        (
            lambda: Cascade(merging, Full(9)),
            "Scored must be the last tier of a Cascade: Gaussian merges",
        ),
        (lambda: Scored(4, KNorm(), merge="d2o"), "Scored.merge is 'd2o': it must be Merge or None"),
        (lambda: NearestAbove(momentum=1.5), "NearestAbove.momentum is 1.5: it must be a number from 0 to 1"),
        (lambda: IntoFollowing(count=0), "IntoFollowing.count is 0: it must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.quick
def test_streams_saved_before_there_were_merge_rules_still_fit():
    """Saved streams name their caches in words."""
    plain = "Scored(size=4, score=KNorm(), per_head=True, every=64, distance=None)"
    assert repr(Scored(4, KNorm())) == plain
    assert repr(Scored(4, KNorm(), merge=Anchors())) == plain[:-1] + ", merge=Anchors(turned=False))"
