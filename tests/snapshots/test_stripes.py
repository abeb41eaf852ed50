"""Codes over machines: whatever is lost, up to as many as may be, is computed again byte for byte."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.snapshots.choosing import Reader, held_by, newest
from streamjax.snapshots.generations import Generation
from streamjax.snapshots.stripes import Layout, piece_bounds

PARTS = st.lists(st.integers(0, 50), min_size=1, max_size=3)  # bytes that each process of a machine has


def give(layout, sizes, seed=0):
    """What each machine holds when all have exchanged their codes, and what each process gave."""
    held, given_by, process = [Generation(layout, host) for host in range(layout.hosts)], {}, 0
    for generation, parts in zip(held, sizes, strict=True):
        local = list(range(process, process + len(parts)))
        for number, size in zip(local, parts, strict=True):
            given_by[number] = bytes((7 * number + 13 * place + seed) % 256 for place in range(size))
            assert generation.put(number, bytearray(given_by[number]), local) == (number == local[-1])
        process += len(parts)
    for generation in held:
        for stripe, block, machine, piece, data in generation.pieces():
            to = held[generation.group[machine]]
            to.add_piece(stripe, block, piece, generation.heads[generation.machine], b"".join(data))
    return held, given_by


class Asked(Reader):
    """Reads from generations in place of keepers."""

    def __init__(self, name, held, generations):
        super().__init__(name, held, b"")
        self._generations = generations

    def _ask(self, address, head):
        found = self._generations[address]
        if head["op"] == "code":
            return found.codes[head["stripe"], head["block"]]
        return bytearray(b"".join(found.data(head["start"], head["end"])))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 3), st.data())
def test_what_lost_machines_held_is_computed_again(hosts, most, lost, data):
    smallest = hosts // -(-hosts // most)
    layout = Layout(hosts, most, min(lost, smallest - 1))
    sizes = data.draw(st.lists(PARTS, min_size=hosts, max_size=hosts))
    gone: set[int] = set()
    for group in layout.groups if hosts > 1 else ():
        gone |= data.draw(st.sets(st.sampled_from(list(group)), max_size=layout.lost))
    held, given_by = give(layout, sizes)
    assert all(generation.is_complete_here for generation in held)
    statuses = [(host, [["start", 5, found.describe()]]) for host, found in enumerate(held) if host not in gone]
    if not statuses:
        return
    found = held_by(statuses)
    assert newest(found) == ("start", 5)
    reader = Asked(("start", 5), found["start", 5], held)
    assert {process: bytes(reader.read(process)) for process in given_by} == given_by


@pytest.mark.parametrize("lost", [1, 2])
def test_more_than_may_be_lost_is_told(lost):
    layout = Layout(4, 4, lost)
    held, _ = give(layout, [[10]] * 4)
    left = [(host, [["start", 5, held[host].describe()]]) for host in range(3 - lost)]
    assert newest(held_by(left)) is None
    with pytest.raises(LookupError, match="too few machines"):
        Asked(("start", 5), held_by(left)["start", 5], held).read(3)


def test_the_newest_that_is_whole_counts():
    layout = Layout(3, 8, 1)
    early, late = give(layout, [[9]] * 3)[0], [Generation(layout, host) for host in range(3)]
    late[0].put(0, bytearray(9), [0])
    statuses = [(host, [["a", 4, early[host].describe()], ["a", 8, late[host].describe()]]) for host in range(3)]
    assert newest(held_by(statuses)) == ("a", 4)
    assert newest(held_by(statuses[1:])) == ("a", 4)
    assert newest(held_by([])) is None


@given(st.integers(1, 100), st.integers(2, 12), st.integers(0, 3))
def test_groups_cover_all_machines_and_have_at_most_so_many(hosts, most, lost):
    count = -(-hosts // most)
    if hosts > 1 and hosts // count <= lost:
        with pytest.raises(ValueError, match=r"snapshots\.lost is"):
            Layout(hosts, most, lost)
        return
    layout = Layout(hosts, most, lost)
    assert [host for group in layout.groups for host in group] == list(range(hosts))
    assert max(map(len, layout.groups)) <= most
    assert dataclasses.astuple(layout) == (hosts, most, lost)


@given(st.integers(0, 100), st.integers(1, 9))
def test_pieces_follow_each_other(size, pieces):
    bounds = piece_bounds(size, pieces)
    assert [byte for bound in bounds for byte in range(*bound)] == list(range(size))
    assert len(bounds) == pieces
