"""Cascades against plain lists: which tokens a query sees, how far away, and in which order they fall."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamjax.kv import Cascade, Full, Sink, Window
from tests.kv.visible_keys import distances

TOTAL = 34
WIDTH = 17  # of padded chunks: more than any window holds


def by_lists(tiers, total: int) -> np.ndarray:
    """Token by token: what each query sees, itself included, and at which distance.

    Every tier is a list. A token goes to the first tier; sinks and full tiers keep what they have, windows push out
    their oldest token, and what is pushed out or not kept goes to the next tier. A sink stands no farther than the
    number of slots of all tiers.
    """
    kept = [[] for _ in tiers]
    reach = sum(tier.slots for tier in tiers)
    table = np.full((total, total), np.nan)
    for query in range(total):
        falling = query
        for tier, held in zip(tiers, kept, strict=True):
            if isinstance(tier, Sink) and len(held) < tier.size:
                held.append(falling)
                falling = None
                break
            if not isinstance(tier, Sink):
                break
        table[query, query] = 0
        for tier, held in zip(tiers, kept, strict=True):
            for token in held:
                place = min(query, reach) if isinstance(tier, Sink) else query
                table[query, token] = place - token
        for tier, held in zip(tiers, kept, strict=True):
            if falling is None:
                break
            if isinstance(tier, Window):
                held.append(falling)
                falling = held.pop(0) if len(held) > tier.size else None
            elif len(held) < tier.slots:
                held.append(falling)
                falling = None
    return table


CASCADES = {
    "window": (Window(6),),
    "sink": (Sink(4),),
    "sink window": (Sink(3), Window(6)),
    "window window": (Window(5), Window(7)),
    "sink window window": (Sink(2), Window(5), Window(7)),
    "sink full": (Sink(3), Full(TOTAL - 3)),
    "window full": (Window(5), Full(TOTAL - 5)),
    "sink window full": (Sink(2), Window(5), Full(TOTAL - 7)),
}


def cascade(name: str) -> Cascade:
    return Cascade(*CASCADES["sink window"]) if name == "fused" else Cascade(*CASCADES[name], fuse=False)


def expected(name: str) -> np.ndarray:
    return by_lists(CASCADES["sink window" if name == "fused" else name], TOTAL)


@pytest.mark.parametrize("name", ["sink window", "fused", "window window", "window full"])
def test_one_token_at_a_time(name):
    np.testing.assert_array_equal(distances(cascade(name), TOTAL, [1]), expected(name))


@pytest.mark.usual("sink window window", "sink window full", "window window", "fused", "sink full")
@pytest.mark.parametrize("name", [*CASCADES, "fused"])
@settings(max_examples=12)
@given(counts=st.lists(st.integers(0, WIDTH), min_size=1, max_size=8).filter(any))
@example(counts=[WIDTH])
@example(counts=[1])
@example(counts=[2, WIDTH, 0])
def test_padded_chunks_of_any_length(name, counts):
    np.testing.assert_array_equal(distances(cascade(name), TOTAL, counts, width=WIDTH), expected(name))


@pytest.mark.quick
def test_mixed_chunks_and_one_longer_than_everything():
    for cut in ([1, WIDTH - 1], [TOTAL]):  # which leave no rest, another program
        np.testing.assert_array_equal(distances(cascade("fused"), TOTAL, cut), expected("fused"))


@pytest.mark.quick
@pytest.mark.parametrize("start", [10**9, 2**31 - 10, 2**32 - 10])
@pytest.mark.parametrize("name", ["fused", "sink window"])
def test_distances_do_not_depend_on_where_the_stream_starts(start, name):
    np.testing.assert_array_equal(distances(cascade(name), TOTAL, [1, WIDTH], WIDTH, start), expected(name))


@pytest.mark.quick
def test_two_windows_are_one_larger_window():
    two, one = Cascade(Window(5), Window(7)), Cascade(Window(12))
    np.testing.assert_array_equal(distances(two, TOTAL, [1, WIDTH], WIDTH), distances(one, TOTAL, [WIDTH]))


@pytest.mark.quick
def test_slots_and_capacity():
    assert Cascade(Sink(3), Window(6)).slots == 9
    assert Cascade(Sink(3), Window(6)).capacity is None
    assert Cascade(Window(6), Full(5)).capacity == 11
    assert Cascade(Full(5)).capacity == 5


@pytest.mark.quick
def test_cascades_are_values():
    assert Cascade(Sink(3), Window(6)) == Cascade(Sink(3), Window(6))
    assert hash(Cascade(Sink(3), Window(6))) == hash(Cascade(Sink(3), Window(6)))
    assert Cascade(Sink(3), Window(6)) != Cascade(Sink(3), Window(7))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cascade(), "at least one tier"),
        (lambda: Cascade(Window(3), Sink(2)), "Sink must be the first tier"),
        (lambda: Cascade(Full(3), Window(2)), "Full must be the last tier"),
        (lambda: Cascade(7), "not 7"),
        (lambda: Window(0), "Window.size is 0: it must be a whole number of at least 1"),
        (lambda: Sink(0), "Sink.size is 0: it must be a whole number of at least 1"),
        (lambda: Full(0), "Full.capacity is 0: it must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_a_cascade_says_so_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
