import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.streaming.bitstreams import Choice, choose, entropy_coder


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(0, 40), lanes=st.integers(1, 7), symbols=st.integers(2, 127))
def test_what_goes_in_comes_out(seed, length, lanes, symbols):
    random = np.random.default_rng(seed)
    tables = entropy_coder.table(random.random((lanes, symbols)) ** random.integers(0, 9))
    assert (tables.sum(axis=1, dtype=int) == 4096).all()
    assert tables.min() >= 1
    lines = random.integers(0, symbols, (length, lanes))
    states, words = entropy_coder.encode(lines, tables)
    np.testing.assert_array_equal(entropy_coder.decode(states, words, tables, length), lines)


def test_bits_are_as_few_as_frequencies_allow():
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(20) * 0.3, 6)
    lines = np.stack([random.choice(20, 4000, p=share) for share in shares], axis=1)
    tables = entropy_coder.table(np.stack([np.bincount(line, minlength=20) for line in lines.T]).astype(float))
    _, words = entropy_coder.encode(lines, tables)
    ideal = -np.log2(np.take_along_axis(tables / 4096, lines.T, axis=1)).sum()
    assert ideal - 32 * 6 < 16 * len(words) < 1.001 * ideal + 64


def test_other_words_are_refused():
    tables = entropy_coder.table(np.ones((3, 5)))
    states, words = entropy_coder.encode(np.random.default_rng(0).integers(0, 5, (50, 3)), tables)
    with pytest.raises(ValueError, match="the bits end before the tokens do"):
        entropy_coder.decode(states, words[:-1], tables, 50)
    with pytest.raises(ValueError, match="the bits are not those of these tokens"):
        entropy_coder.decode(states, np.append(words, words[:1]), tables, 50)


@pytest.mark.parametrize(
    ("bandwidth", "seconds", "chosen"),
    [
        (1e6, 5.0, Choice(None, 4.5)),  # there is time to read the text
        (1e6, 3.5, Choice(0, 3.0)),
        (1e6, 1.5, Choice(2, 1.0)),
        (1e6, 0.1, Choice(2, 1.0)),  # nothing comes in time: the fastest
        (1e5, 6.0, Choice(None, 4.5)),  # a bad line: reading the text is faster
    ],
)
def test_the_least_lossy_way_that_comes_in_time(bandwidth, seconds, chosen):
    found = choose([3e6, 2e6, 1e6], bandwidth=bandwidth, seconds=seconds, text_seconds=4.5)
    assert found == chosen


def test_a_choice_from_nothing_is_refused():
    for sizes, bandwidth, message in (([], 1.0, "sizes is"), ([-1.0], 1.0, "sizes is"), ([1.0], 0.0, "bandwidth is 0")):
        with pytest.raises(ValueError, match=message):
            choose(sizes, bandwidth=bandwidth, seconds=1.0, text_seconds=1.0)
