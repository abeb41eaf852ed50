"""Tokens as coordinates of low rank, against loops and numpy's singular values, however a stream is cut."""

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.covering import rest_slow
from tests.kv.tier_streams import FREQUENCIES, SCALE, Stream, run
from tests.oracles import channels
from tests.oracles.rotation import Turning

WINDOW, GROUP, LENGTH = 5, 8, 61
STREAM = Stream.drawn(2, LENGTH)
OWN = sj.kv.Cascade(sj.kv.Window(WINDOW), sj.kv.LowRank(64, keys=0.5, values=0.5, group=GROUP))
WHOLE_VALUES = sj.kv.Cascade(sj.kv.Window(WINDOW), sj.kv.LowRank(64, keys=0.3, values=1, group=GROUP))


class Turned(Turning):
    frequencies = FREQUENCIES


def given():
    """A cache whose bases are given."""
    random = np.random.default_rng(3)
    bases = [np.linalg.qr(random.standard_normal((12, 12)))[0].astype(np.float32)[:, :8] for _ in "kv"]
    factors = sj.kv.Factors(*(basis.tobytes() for basis in bases), 12, "whose")
    return sj.kv.Cascade(sj.kv.Window(WINDOW), sj.kv.LowRank(64, keys=0.5, values=0.3, factors=factors)), bases


def expected(stream, row, ranks, group, bases=None):
    """Keys before rotation and values as they are held when all tokens have come."""
    found = []
    for i, (x, rank) in enumerate(zip((stream.k[row], stream.v[row]), ranks, strict=True)):
        basis = channels.best_basis(x[:group], rank) if bases is None else bases[i][:, :rank]
        found.append(channels.low_rank(x, WINDOW, group, basis))
    return found


CASES = {
    "own": (OWN, (6, 6), GROUP, None),
    "whole values": (WHOLE_VALUES, (4, 12), GROUP, None),
    "given": (given()[0], (6, 4), 1, given()[1]),
}


@pytest.mark.parametrize("name", rest_slow(CASES, "own"))
def test_tokens_are_coordinates_however_a_stream_is_cut(name):
    cache, ranks, group, bases = CASES[name]
    out, state = run(cache, STREAM, [1], width=12, frequencies=FREQUENCIES)
    _, other = run(cache, STREAM, [(3, 12), (12, 1)], width=12, frequencies=FREQUENCIES)
    count = (LENGTH - WINDOW) // group * group
    for tier in (state[1], other[1]):
        for row in range(2):
            k, v = expected(STREAM, row, ranks, group, bases)
            for slots, held in ((tier.k, k), (tier.v, v)):
                found = np.asarray(slots.dense())[row, :, :count].swapaxes(0, 1)
                np.testing.assert_allclose(found, held[:count], atol=2e-5)
    for row in range(2):  # the last token reads what was held when it came
        before = Stream(*(x[:, :-1] for x in (STREAM.q, STREAM.k, STREAM.v)))
        k, v = (
            np.concatenate((old, x[row, -1:]))
            for old, x in zip(expected(before, row, ranks, group, bases), (STREAM.k, STREAM.v), strict=True)
        )
        k = np.array([[Turned().turned(key, i) for key in keys] for i, keys in enumerate(k)])
        q = np.array([[Turned().turned(query, LENGTH - 1) for query in STREAM.q[row, -1]]])
        np.testing.assert_allclose(out[row, -1], channels.attend(q, k, v, SCALE)[0], atol=2e-5)


def test_a_token_takes_as_many_bytes_as_its_coordinates():
    tier = sj.kv.LowRank(1024, keys=0.5, values=0.25, group=128)
    spec = sj.kv.KVSpec(1, 3, 64, np.dtype("bfloat16"))
    state = jax.eval_shape(lambda: tier.init(spec))
    assert state.k.codes.size + state.v.codes.size == 1024 * 3 * 64 * 0.75
    assert state.k.codes.dtype == np.dtype("bfloat16")


def test_layers_with_bases_of_their_own_are_one_program():
    one, _ = given()[0].renumbered()
    other = sj.kv.Cascade(sj.kv.Window(WINDOW), sj.kv.LowRank(64, keys=0.5, values=0.3))
    assert one == other.renumbered()[0] == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": 0}, "LowRank.keys is 0: it must be a number above 0"),
        ({"group": 4}, r"4 tokens \(group\) make no basis of 6 directions"),
        (
            {"factors": sj.kv.Factors(b"\0" * 40, b"\0" * 40, 10, "")},
            "the factors are of 10 channels, and the layer caches 12",
        ),
        (
            {"factors": sj.kv.Factors(b"\0" * 96, b"\0" * 96, 12, "")},
            "the factors have 2 directions, and 6 are asked for",
        ),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sj.kv.LowRank(64, **options).init(sj.kv.KVSpec(1, 2, 6, np.dtype(np.float32)))
