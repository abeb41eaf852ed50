"""Keys that lose the channels which queries need least, against the rule in loops, however a stream is cut."""

import numpy as np
import pytest

import streamjax as sj
from tests.kv.tier_streams import SCALE, Stream, run
from tests.oracles import channels

CACHE = sj.kv.preset("think", keep=0.5, window=5, group=8, queries=3, capacity=64)
STREAM = Stream.drawn(2, 61)


def held(state):
    """Keys [B, T, K, D] and values of all that a stream holds, in its order."""
    ring, (slots) = state[0], state[1].slots
    count, own = 61 - 5, [(int(ring.cursor[0]) + i) % 5 for i in range(5)]
    both = [(slots.k.dense()[:, :, :count], ring.k[:, :, own]), (slots.v.dense()[:, :, :count], ring.v[:, :, own])]
    return [np.concatenate(parts, axis=2).swapaxes(1, 2) for parts in both]


@pytest.mark.parametrize("cut", [[1], [12], [(3, 12), (12, 1)]], ids=["1", "12", "ragged"])
def test_keys_are_pruned_as_the_rule_says_however_a_stream_is_cut(cut):
    out, state = run(CACHE, STREAM, cut, width=1 if cut == [1] else 12)
    k, v = held(state)
    for row in range(2):
        expected = channels.think(STREAM.q[row], STREAM.k[row], 3, 5, 8, 3)
        np.testing.assert_allclose(k[row], expected, atol=1e-6)
        assert (np.sum(k[row] == 0, axis=2)[:48] == 3).all()
        np.testing.assert_allclose(v[row], STREAM.v[row], atol=1e-6)
        if cut == [1]:  # the last token reads what was held when it came
            found = channels.attend(STREAM.q[row, -1:], before_last(STREAM, row), STREAM.v[row], SCALE)
            np.testing.assert_allclose(out[row, -1], found[0], atol=1e-5)


def before_last(stream, row):
    """Keys as they are held when the last token comes."""
    return np.concatenate((channels.think(stream.q[row, :-1], stream.k[row, :-1], 3, 5, 8, 3), stream.k[row, -1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "PrunedKeys.keep is 0: it must be a number above 0"),
        ({"keep": 1.5}, "keep is 1.5: it must be a number from 0 to 1"),
        ({"group": 16}, "PrunedKeys.queries is 32, but a block has 16 of them"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sj.kv.preset("think", **options)
