"""Patterns by brute force: who sees whom, and block bounds that leave nothing out."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.patterns import Chunked, Full, SinkWindow, SlidingWindow

LENGTH = 23


def brute_force(pattern, query: int, key: int) -> bool:
    if key > query:
        return False
    if isinstance(pattern, Full):
        return True
    if isinstance(pattern, Chunked):
        return query // pattern.size == key // pattern.size
    near = query - key < pattern.window
    return near or (isinstance(pattern, SinkWindow) and key < pattern.sinks)


PATTERNS = [Full(), SlidingWindow(1), SlidingWindow(6), SlidingWindow(99), SinkWindow(3, 6), SinkWindow(0, 4)]
PATTERNS += [Chunked(1), Chunked(5), Chunked(99)]


@pytest.mark.quick
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_visible_pairs(pattern):
    index = jnp.arange(LENGTH)
    visible = np.asarray(pattern.mask(index[:, None], index[None, :]))
    expected = [[brute_force(pattern, q, k) for k in range(LENGTH)] for q in range(LENGTH)]
    np.testing.assert_array_equal(visible, expected)


@pytest.mark.quick
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_bounds_hold_every_visible_key_and_none_to_spare(pattern):
    sinks = getattr(pattern, "sinks", 0)
    for first in range(LENGTH):
        for last in range(first, LENGTH):
            low, high = (int(bound) for bound in pattern.key_range(first, last))
            seen = {
                key
                for query in range(first, last + 1)
                for key in range(LENGTH)
                if brute_force(pattern, query, key) and not (key < sinks and query - key >= pattern.window)
            }
            assert seen == set(range(low, high)) & seen
            assert low == min(seen)
            assert high == max(seen) + 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "SlidingWindow.window must be at least 1"),
        (lambda: SinkWindow(-1, 4), "sinks >= 0"),
        (lambda: SinkWindow(2, 0), "window >= 1"),
        (lambda: Chunked(0), "Chunked.size must be at least 1"),
    ],
)
def test_impossible_patterns(make, message):
    with pytest.raises(ValueError, match=message):
        make()
