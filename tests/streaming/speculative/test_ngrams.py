"""What n-grams find, in which database, and when guessing pauses."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamjax as sj
from streamjax.streaming.speculative.drafter import Draws, ways_of_tree
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.pace import SHARE, START, Pace

DRAWS = Draws(sj.Sampler(temperature=0), None, np.zeros(1, np.int32), jnp.zeros((1, 1)))


def guess(drafter: sj.NGrams, stream) -> list[int]:
    drafts = drafter.propose([History(stream)], [True], DRAWS)
    return drafts.tokens[0, : drafts.count[0]].tolist()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ([1, 2, 3, 9, 8, 7, 5, 2, 3], [9, 8, 7, 5]),  # what followed the same two tokens
        ([1, 2, 3, 4, 0, 7, 2, 3, 5, 0, 1, 2, 3], [4, 0, 7, 2]),  # three that agree are better than two, though older
        ([2, 3, 4, 0, 2, 3, 5, 0, 2, 3], [5, 0, 2, 3]),  # the newest of equally long ones
        ([6, 1, 2, 1, 2], [1, 2, 1, 2]),  # it goes round: so will what follows
        ([4, 4, 4], [4, 4, 4, 4]),
        ([1, 2, 3, 4], []),
        ([1, 3, 2, 3], []),  # one token is not enough
        ([5], []),
        ([], []),
    ],
)
def test_the_newest_of_the_longest_matches(stream, expected):
    assert guess(sj.NGrams(length=4), stream) == expected


@pytest.mark.quick
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 4), st.integers(0, 3))
def test_ways_are_the_guesses_behind_each_next_token(stream, shortest, more):
    drafter = sj.NGrams(length=5, shortest=shortest, longest=shortest + more)
    found = drafter.ways(np.array(stream, np.int32), 9)
    ways = {int(way[0]): way[1:].tolist() for way in found}
    assert len(ways) == len(found)
    assert ways == {token: said for token in range(4) if (said := guess(drafter, [*stream, token]))}
    assert [way.tolist() for way in drafter.ways(np.array(stream, np.int32), 2)] == [way.tolist() for way in found[:2]]


@pytest.mark.quick
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3))
def test_branches_are_ways_to_go_on(stream, length):
    """The first is what would be guessed alone; they differ in their first token, and each has stood in the stream."""
    one, three = sj.NGrams(length=length), sj.NGrams(length=length, branches=3)
    drafts = three.propose([History(stream)], [True], DRAWS)
    ways = [way[1:] for way in ways_of_tree(np.pad(drafts.parents, ((0, 0), (1, 0))))[0][: drafts.count[0] + 1]]
    tokens = [[int(drafts.tokens[0, node - 1]) for node in way] for way in ways]
    assert tokens[length if drafts.count[0] else 0] == guess(one, stream)
    first = [way[0] for way in tokens if len(way) == 1]
    assert len(first) == len(set(first)) == drafts.count[0] / length
    text = " ".join(map(str, stream))
    assert all(f"{stream[-1]} {token}" in text for token in first)


@pytest.mark.quick
def test_databases_are_asked_by_how_near_they_are():
    drafter = sj.NGrams(length=2, text=[1, 2, 30, 31, 32, 5, 6, 40, 41])
    assert guess(drafter, [1, 2]) == [30, 31]
    drafter.learn(np.array([1, 2, 20, 21], np.int32))
    assert guess(drafter, [1, 2]) == [20, 21]
    assert guess(drafter, [1, 2, 10, 11, 1, 2]) == [10, 11]
    assert guess(drafter, [9, 5, 6]) == [40, 41]


@pytest.mark.quick
def test_a_history_forgets_the_oldest_and_counts_all():
    history, total = History(kept=10), 0
    for size in (3, 0, 9, 25, 1, 7):
        history.extend(list(range(total, total + size)))
        total += size
        assert history.total == total
        assert history.tokens.tolist() == list(range(total - len(history.tokens), total))
        assert min(total, 10) <= len(history.tokens) <= 20
    assert history.since(total - 3).tolist() == [42, 43, 44]
    other = history.copy()
    other.extend([0])
    assert history.total == other.total - 1 == total


@pytest.mark.quick
@given(rights=st.lists(st.integers(0, 7), min_size=1, max_size=300), cost=st.floats(1, 4))
def test_guessing_costs_little_whatever_is_right(rights, cost):
    """The time of all passes, in passes over a single token, against what the tokens would have taken one by one."""
    pace, time, tokens = Pace(1, 8, cost), 0.0, 0
    for right in rights:
        guesses = bool(pace.wants[0])
        pace.note(np.array([7 * guesses]), np.array([right * guesses]))
        time += cost if guesses else 1
        tokens += 1 + right * guesses
    assert time <= tokens * (1 + SHARE) + START + cost - 1 + 1e-6


@pytest.mark.quick
def test_guessing_pauses_where_it_fails_and_goes_on_where_it_pays():
    pace, tried = Pace(2, 8, cost=2.5), np.zeros(2, int)
    for _ in range(400):
        tries = pace.wants
        tried += tries
        pace.note(7 * tries, np.array([0, 2]) * tries)
    assert 5 < tried[0] < 400 / 32 + 6
    assert tried[1] == 400


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "NGrams.length is 0: it must be a whole number of at least 1"),
        ({"shortest": 4, "longest": 3}, "NGrams.longest is 3: it must be at least shortest, 4"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        sj.NGrams(**options)
