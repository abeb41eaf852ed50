"""Groups of heads whose first tiers lie together compute what they compute with tiers of their own."""

import jax
import numpy as np
import pytest

from streamjax.kv import TOVA, Cascade, Int, Pages, Scored, SharedFront, Sink, Window
from streamjax.kv.presets.in_codes import in_codes
from tests.kv.tier_streams import FREQUENCIES, SLOPES, Stream, run

FRONT = Sink(2, reach=2**30), Window(3)
FAR, NEAR = Cascade(*FRONT, Pages(2, 8, 2)), Cascade(*FRONT)
SINK_LOGITS = (0.3, -0.8, 1.1, 0.2)


@pytest.mark.parametrize(
    ("order", "known"),
    [
        pytest.param(((1,), (0,)), {"frequencies": FREQUENCIES}, id="crossed-rope"),
        pytest.param(((0,), (1,)), {"slopes": SLOPES}, id="in-order-alibi", marks=pytest.mark.slow),
        pytest.param(((1, 0), ()), {"frequencies": FREQUENCIES}, id="all-far", marks=pytest.mark.slow),
        pytest.param(((), (0, 1)), {"frequencies": FREQUENCIES}, id="all-near"),
    ],
)
def test_it_is_the_groups_with_tiers_of_their_own(order, known):
    """Two rows in chunks longer than the window and token by token: outputs within rounding, states to the bit."""
    stream = Stream.drawn(2, 30)
    cache = SharedFront(2, *zip(order, (FAR, NEAR), strict=True))
    found, state = run(cache, stream, [7, 1], sink_logits=SINK_LOGITS, **known)
    expected, theirs = run(cache.plain(), stream, [7, 1], sink_logits=SINK_LOGITS, **known)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mine = jax.tree.leaves(cache.apart(state))
    assert len(mine) == len(jax.tree.leaves(theirs))
    for a, b in zip(mine, jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    bytes_held = [sum(size for _, size in sizes) for sizes in (cache.sizes(state), cache.plain().sizes(theirs))]
    assert 0 <= bytes_held[1] - bytes_held[0] < 0.1 * bytes_held[1]  # positions and counters are kept once
    np.testing.assert_array_equal(cache.levels(state), cache.plain().levels(theirs))


def test_codes_reach_the_window_and_what_is_behind_it():
    rules = [Cascade(FRONT[0], Window(128), *behind) for behind in ((Pages(64, 256, 2),), ())]
    coded = in_codes(SharedFront(2, ((1,), rules[0]), ((0,), rules[1])), Int(8))
    assert isinstance(coded, SharedFront)
    assert coded.shared.tiers[1].codec == coded.behind_front(coded.groups[0][1]).tiers[0].codec == Int(8)
    short = in_codes(SharedFront(2, ((1,), FAR), ((0,), NEAR)), Int(8))
    assert short.shared == Cascade(*FRONT, fuse=False)


def test_what_has_no_shared_front_is_refused():
    with pytest.raises(ValueError, match="begin with the same 2 tiers"):
        SharedFront(2, ((0,), FAR), ((1,), Cascade(FRONT[0], Window(4))))
    with pytest.raises(ValueError, match="begin with the same 3 tiers"):
        SharedFront(3, ((0,), FAR), ((1,), NEAR))
    with pytest.raises(ValueError, match="choose nothing by attention"):
        SharedFront(1, ((0, 1), Cascade(Window(3), Scored(4, TOVA(), every=2))))
    with pytest.raises(ValueError, match="behind a SharedFront is a tier without a bound"):
        SharedFront(2, ((0,), Cascade(*FRONT, Window(4))), ((1,), NEAR))
    with pytest.raises(ValueError, match=r"in one group, got \[0, 2\]"):
        SharedFront(2, ((0, 2), NEAR))
