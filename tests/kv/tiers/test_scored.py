"""Tokens kept by a score against plain lists, for every score; what does not depend on how a stream is cut."""

import numpy as np
import pytest

from streamjax.kv import (
    CUR,
    H2O,
    TOVA,
    Cascade,
    ChunkKV,
    ExpectedAttention,
    Finch,
    Full,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    Leverage,
    MeanAttention,
    QFilters,
    RandomChoice,
    Retaining,
    RetainingHeads,
    Scissorhands,
    Scored,
    Sink,
    SnapKV,
    Window,
    WindowKV,
)
from tests.kv.tier_streams import (
    FREQUENCIES,
    HEADS,
    KEY_HEADS,
    SCALE,
    SLOPES,
    WIDTH,
    Stream,
    gradients,
    plain_attention,
    run,
    spec,
)
from tests.oracles import scored as oracle

SINKS, WINDOW, SIZE, EVERY, LENGTH = 2, 3, 7, 4, 45
DRAWN = np.random.default_rng(7)
NETWORK = DRAWN.standard_normal(((HEADS + 2 * KEY_HEADS) * WIDTH, 5)), DRAWN.standard_normal((5, KEY_HEADS))
SCORES = {
    "h2o": (H2O(), oracle.mass),
    "mean attention": (MeanAttention(), oracle.mean),
    "tova": (TOVA(), oracle.newest(1)),
    "snapkv": (SnapKV(window=3, kernel=3), oracle.newest(3, 3)),
    "snapkv, max": (SnapKV(window=4, kernel=5, pool="max"), oracle.newest(4, 5, "max")),
    "scissorhands": (Scissorhands(), oracle.above_mean(SINKS + WINDOW + SIZE + EVERY)),
    "knorm": (KNorm(), oracle.short_keys),
    "keydiff": (KeyDiff(), oracle.unlike_the_mean),
    "lagkv": (LagKV(), oracle.lagged),
    "expected attention": (ExpectedAttention(ahead=5, skip=3), oracle.expected(3, 5)),
    "random": (RandomChoice(seed=5), oracle.drawn(5)),
    "chunkkv": (ChunkKV(SnapKV(3, kernel=1), chunk=2), oracle.in_stretches(oracle.newest(3), 2)),
    "windowkv": (WindowKV(H2O(), length=4, best=2), oracle.in_stretches(oracle.mass, 4, 2)),
    "cur": (CUR(local=2), oracle.long_beside_neighbours(2)),
    "leverage": (Leverage(), oracle.leverage(1e-4)),
    "finch": (Finch(window=3), oracle.weighted(3, SINKS + WINDOW + SIZE + EVERY)),
    "kvzip": (KVzip(), oracle.largest),
    "qfilters": (QFilters(), oracle.along_queries),
    "retaining": (Retaining(RetainingHeads.from_arrays(*NETWORK, model="whose")), oracle.retained(*NETWORK)),
}

# What these keep of a whole prompt is held to published rules in tests/streaming/compacting/test_compact.py.
OF_PROMPTS = ("lagkv", "expected attention", "cur", "kvzip", "qfilters")
# These note nothing, or what others note: no sinks and no window stand before their tier.
ALONE = ("mean attention", "chunkkv", "knorm", "keydiff", "random", "leverage", "retaining")
ONE_BY_ONE = ("h2o", "lagkv")  # by heads in chunks of one; with the others one token lies in a chunk of six


def cascade(score, size=SIZE, every=EVERY, **options):
    return Cascade(Sink(SINKS, reach=10**6), Window(WINDOW), Scored(size, score, every=every, **options))


def kept(state) -> list[list[list[int]]]:
    """Positions of what each row and head keeps, in order."""
    slots = state[-1].slots
    return [
        [sorted(p[v].tolist()) for p, v in zip(*heads, strict=True)]
        for heads in zip(np.asarray(slots.position), np.asarray(slots.valid), strict=True)
    ]


def expected(rule, stream):
    """Outputs of the lists, and what each row's heads keep."""
    rows, places = [], []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = oracle.Stream(rule)
        rows.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
        places.append([[e[2] for e in head] for head in lists.kept])
    return np.array(rows), places


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "positions", "distance", "together"),
    [
        *((name, "rope", None, False) for name in SCORES if name != "snapkv, max" and name not in OF_PROMPTS),
        *(pytest.param(name, "rope", None, False, marks=pytest.mark.slow) for name in OF_PROMPTS),
        pytest.param("snapkv, max", "rope", None, False, marks=pytest.mark.slow),
        ("h2o", "alibi", None, True),
        ("snapkv", "alibi", 5, False),
        pytest.param("keydiff", "rope", 9, False, marks=pytest.mark.slow),
    ],
)
def test_a_stream_token_by_token(name, positions, distance, together):
    """Outputs and kept positions, read a token at a time, and of two rows in chunks that end anywhere.

    At a fixed distance what leaves the window is seen at its true one until its chunk is stored.
    """
    score, rank = SCORES[name]
    slopes, frequencies = SLOPES if positions == "alibi" else None, FREQUENCIES if positions == "rope" else None
    stream = Stream.drawn(2, LENGTH)
    if name == "qfilters":  # queries have a direction that spreads most
        stream.q[..., 0] *= 4
        stream.q[..., 5] += 3
    sinks, window = (0, 0) if name in ALONE and not distance else (SINKS, WINDOW)
    rule = oracle.Rule(
        KEY_HEADS, sinks, window, SIZE, EVERY, rank, SCALE, slopes, frequencies, distance, together
    )  # fmt: skip
    out, places = expected(rule, stream)
    mine = cascade(score, per_head=not together, distance=distance)
    mine = mine if sinks else Cascade(mine.tiers[-1])
    alone = 1 if distance or (name in ONE_BY_ONE and not together) else 6  # wide
    for counts, width in (([1], alone), ([(3, 1), (1, 6)], 6))[: 1 if distance else 2]:
        found, state = run(mine, stream, counts, width=width, slopes=slopes, frequencies=frequencies)
        np.testing.assert_allclose(found, out, atol=1e-4)
        assert kept(state) == ([heads[:1] for heads in places] if together else places)
    if not together:
        assert any(first != second for first, second in places)  # each head keeps tokens of its own


@pytest.mark.usual("16")
@pytest.mark.parametrize("every", [1, 16])
def test_any_number_of_tokens_between_two_choices(every):
    stream = Stream.drawn(1, 40)
    out, places = expected(oracle.Rule(KEY_HEADS, SINKS, WINDOW, 5, every, oracle.mass, SCALE), stream)
    for counts in ([1], [40]):
        found, state = run(cascade(H2O(), 5, every), stream, counts, width=40)
        np.testing.assert_allclose(found, out, atol=1e-4)
        assert kept(state) == places


def test_a_tier_of_its_own_needs_no_window():
    stream = Stream.drawn(1, 30)
    out, places = expected(oracle.Rule(KEY_HEADS, 0, 0, 6, 2, oracle.newest(1), SCALE), stream)
    found, state = run(Cascade(Scored(6, TOVA(), every=2)), stream, [15])
    np.testing.assert_allclose(found, out, atol=1e-4)
    assert kept(state) == places


@pytest.mark.parametrize("distance", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_what_loses_falls_on(distance):
    """In front of a tier that keeps everything nothing is lost: at true distances that is dense attention."""
    stream = Stream.drawn(2, 40)
    mine = Cascade(Window(3), Scored(4, H2O(), every=4, distance=distance), Scored(3, H2O(), every=4), Full(40))
    for counts in ([1], [(1, 5), (7, 2)]):
        found, (*_, full) = run(mine, stream, counts, width=7, frequencies=FREQUENCIES)
        if distance is None:
            np.testing.assert_allclose(found, plain_attention(stream, frequencies=FREQUENCIES), atol=1e-5)
    assert full.filled.tolist() == [40 - 3 - 8 - 7] * 2
    heads = np.asarray(full.position)[0, :, : 40 - 3 - 8 - 7]
    assert len({tuple(head) for head in heads}) == KEY_HEADS


@pytest.mark.slow
def test_gradients_flow_through_what_is_kept():
    stream = Stream.drawn(1, 24)
    for name, x in zip("qkv", gradients(cascade(H2O()), stream, 12), strict=True):
        assert np.isfinite(x).all(), name
        assert np.abs(x).max() > 1e-3, name


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scored(0, H2O()), "Scored.size is 0: it must be a whole number of at least 1"),
        (lambda: Scored(4, "h2o"), "Scored.score is 'h2o': it must be Score"),
        (lambda: Scored(4, SnapKV(window=8), every=4), "SnapKV.window is 8, but the tier makes room after every 4"),
        (lambda: SnapKV(kernel=4), "SnapKV.kernel is 4: it must be odd"),
        (
            lambda: Retaining().memory(spec()),
            "Retaining\\(\\) has no heads: train them, python -m train.retaining_heads",
        ),
        (
            lambda: SCORES["retaining"][0].memory(spec(key_heads=1)),
            "the retaining heads are of 48 channels and 2 key heads, and the layer has 36 and 1",
        ),
        (lambda: ChunkKV(LagKV()), "ChunkKV.score is LagKV.*: it cannot be one that remembers"),
        (lambda: Scored(4, ChunkKV(H2O(), 3), every=4), "ChunkKV.chunk is 3, but the tier makes room after every 4"),
        (lambda: Scored(4, WindowKV(H2O(), 8), every=4), "WindowKV.length is 8, but the tier makes room after every 4"),
        (lambda: WindowKV(H2O(), 4, best=5), "WindowKV.best is 5, but a window has 4 tokens"),
        (lambda: Scored(4, CUR(3), every=4), "CUR.local is 3, but the tier makes room after every 4"),
        (lambda: Scored(4, Finch(8), every=4), "Finch.window is 8, but the tier makes room after every 4"),
        (
            lambda: Cascade(Scored(4, H2O(), every=4), Scored(4, H2O(), every=8)),
            "the tiers of a Cascade choose at the same tokens; every is \\[4, 8\\]",
        ),
        (lambda: Cascade(Scored(4, KNorm()), Scored(4, H2O())), "a tier that needs scores has Scored.* before it"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
