"""Averages of streams against averages of arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.evaluation import Curve, log_bins
from streamjax.evaluation.curves import even_bins


@given(sizes=st.lists(st.integers(0, 37), max_size=30), seed=st.integers(0, 9))
def test_a_curve_is_the_mean_of_its_segments(sizes, seed):
    values = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    curve, start = Curve(width=3, max_points=8), 0
    for size in sizes:
        curve.add(values[start : start + size])
        start += size
    points = curve.points()
    assert curve.count == len(values)
    assert len(points) <= 8
    ends = [0] + [end for end, _ in points]
    assert ends[-1] == len(values)
    for begin, end, (_, mean) in zip(ends[:-1], ends[1:], points, strict=True):
        np.testing.assert_allclose(mean, values[begin:end].mean(dtype=np.float64), atol=1e-6)
    if len(values):
        np.testing.assert_allclose(curve.mean, values.mean(dtype=np.float64), atol=1e-6)


def test_a_curve_of_a_long_stream_stays_small():
    curve = Curve(width=2, max_points=4)
    for _ in range(100):
        curve.add(np.arange(10.0))
    assert curve.width == 256
    assert [end for end, _ in curve.points()] == [256, 512, 768, 1000]


def test_nothing_has_no_mean():
    assert np.isnan(Curve().mean)
    assert Curve().points() == []
    with pytest.raises(ValueError, match="even max_points"):
        Curve(max_points=3)


@given(count=st.integers(1, 3000), least=st.integers(1, 90), per_octave=st.integers(1, 5))
def test_bins_cover_everything_once(count, least, per_octave):
    """The bins' borders follow from their means; they lie side by side and end where the numbers do."""
    values = np.arange(count, dtype=np.float64)
    middle, mean = log_bins(values, least, per_octave)
    begins, position = [], 0
    for value in mean:  # the mean of [a, b) of 0, 1, 2, ... is (a + b - 1) / 2
        begins.append(position)
        position = round(2 * value) + 1 - position
    assert position == count
    widths = np.diff([*begins, count])
    assert (widths[:-1] >= least).all()
    np.testing.assert_allclose(middle, np.sqrt((np.array(begins) + 1.0) * np.array([*begins[1:], count])))


def test_bins_widen_with_the_position():
    middle, mean = log_bins(np.ones(100_000), least=64, per_octave=3)
    assert 25 < len(middle) < 35
    np.testing.assert_allclose(np.diff(np.log2(middle[12:-2])), 1 / 3, atol=0.02)
    assert mean.tolist() == [1.0] * len(mean)
    assert log_bins(np.zeros(0))[0].size == 0


@given(count=st.integers(1, 3000), width=st.integers(1, 700))
def test_even_bins_cover_everything_once(count, width):
    middle, mean = even_bins(np.arange(count, dtype=np.float64), width)
    np.testing.assert_allclose(middle, mean + 1)  # of positions counted from 1
    assert (np.diff(middle[:-1]) == width).all()
    assert 2 * middle[-1] - 1 - 2 * width * (len(middle) - 1) == pytest.approx(count - width * (len(middle) - 1))
    assert len(middle) == max(1, int(count / width + 0.5))
    assert even_bins(np.zeros(0), width)[0].size == 0
