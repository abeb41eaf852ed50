"""The tree of prefixes against plain lists: which states are found, which have a place, and which go."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.serving.prefix_tree import PrefixTree
from streamjax.serving.row_states import ParkedState

CHUNK = 2
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=13)


def state(nbytes: int = 8) -> ParkedState:
    return ParkedState((np.zeros(nbytes, np.uint8),))


class PlainTree:
    """The same by looking at all prompts and all states each time."""

    def __init__(self, budget: int, alpha: float, passed_first: bool):
        self.budget, self.alpha, self.passed_first, self.clock = budget, alpha, passed_first, 0
        self.prompts: list[tuple[int, ...]] = []
        self.used: dict[tuple[int, ...], int] = {}
        self.states: dict[tuple[int, ...], ParkedState] = {}

    def whole(self, prompt) -> tuple[int, ...]:
        return tuple(prompt[: len(prompt) // CHUNK * CHUNK])

    def places(self) -> set[tuple[int, ...]]:
        """Ends of prompts, and the longest common beginnings of two of them."""
        found = set(self.prompts)
        for a in self.prompts:
            for b in self.prompts:
                same = 0
                while a[same : same + CHUNK] and a[same : same + CHUNK] == b[same : same + CHUNK]:
                    same += CHUNK
                found.add(a[:same])
        return found - {()}

    def add(self, prompt) -> None:
        self.clock += 1
        self.prompts.append(self.whole(prompt))

    def match(self, prompt) -> tuple[int, ParkedState | None]:
        self.clock += 1
        fitting = [place for place in self.states if self.whole(prompt)[: len(place)] == place]
        if not fitting:
            return 0, None
        best = max(fitting, key=len)
        self.used[best] = self.clock
        return len(best), self.states[best]

    def wants(self, prompt, depth: int) -> bool:
        place = tuple(prompt[:depth])
        return depth > 0 and depth % CHUNK == 0 and place in self.places() and place not in self.states

    def keep(self, prompt, depth: int, one: ParkedState) -> None:
        self.clock += 1
        place = tuple(prompt[:depth])
        self.states[place], self.used[place] = one, self.clock
        while sum(one.nbytes for one in self.states.values()) > self.budget:
            del self.states[min(sorted(self.states, key=self.used.__getitem__), key=self.utility)]

    def passed(self, place) -> bool:
        """Whether all that goes on from here goes through one next place, and so on to one with a state."""
        while self.passed_first:
            further = [p for p in self.places() if len(p) > len(place) and p[: len(place)] == place]
            first = min(further, key=len, default=None)
            if first is None or any(p[: len(first)] != first for p in further):
                return False
            if first in self.states:
                return True
            place = first
        return False

    def utility(self, place) -> float:
        def saved(place) -> float:
            before = (p for p in self.states if len(p) < len(place) and place[: len(p)] == p and not self.passed(p))
            return (len(place) - max(map(len, before), default=0)) / self.states[place].nbytes

        if self.passed(place):
            return 0.0
        newest_last = sorted(self.states, key=lambda place: self.used[place])
        recency = (newest_last.index(place) + 1) / len(self.states)
        return recency + self.alpha * saved(place) / max(map(saved, self.states))


@given(st.lists(PROMPTS, min_size=1, max_size=12), st.integers(8, 60), st.sampled_from([0.0, 1.0, 3.0]), st.booleans())
def test_it_is_what_plain_lists_say(prompts, budget, alpha, passed_first):
    tree = PrefixTree(CHUNK, budget, alpha=alpha, passed_first=passed_first)
    plain = PlainTree(budget, alpha, passed_first)
    for i, prompt in enumerate(prompts):
        tree.add(prompt)
        plain.add(prompt)
        found, wanted = tree.match(prompt), plain.match(prompt)
        assert found == wanted
        for depth in range(found[0] + 1, len(prompt) + 1):
            assert tree.wants(prompt, depth) == plain.wants(prompt, depth)
            if tree.wants(prompt, depth):
                one = state(5 + i % 3)
                tree.keep(prompt, depth, one)
                plain.keep(prompt, depth, one)
        assert tree.nbytes == sum(one.nbytes for one in plain.states.values()) <= budget
        assert sorted(node.depth for node in tree.holding()) == sorted(map(len, plain.states))


def test_what_two_waiting_prompts_share_is_known_before_one_is_read():
    tree = PrefixTree(CHUNK, 100)
    shared = [1, 2, 3, 4]
    tree.add([*shared, 5, 6])
    assert not tree.wants([*shared, 5, 6], 4)
    tree.add([*shared, 7, 8])
    assert tree.wants([*shared, 5, 6], 4)
    assert tree.wants([*shared, 5, 6], 6)
    assert not tree.wants([*shared, 5, 6], 2)


def test_a_state_that_saves_much_per_byte_outlives_newer_ones():
    trace = [[9] * 64, *([i, i] for i in range(8))]
    for alpha, stays in ((3.0, True), (0.0, False)):
        tree = PrefixTree(CHUNK, 40, alpha=alpha)
        for prompt in trace:
            tree.add(prompt)
            tree.keep(prompt, len(prompt), state())
        assert (tree.match(trace[0])[0] == 64) == stays


def test_states_that_are_passed_go_first():
    """A session's earlier turns, but not where somebody went another way."""
    tree = PrefixTree(CHUNK, 24)
    other, turns = [9, 9, 8, 8], [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
    for prompt in (other, *turns):
        tree.add(prompt)
        tree.keep(prompt, len(prompt), state())
    assert [tree.match(prompt)[0] for prompt in (other, *turns)] == [4, 0, 4, 8]  # [1, 2] went, the oldest passed one
    tree.add([1, 2, 3, 4, 0, 0])  # parts behind [1, 2, 3, 4]: it is not passed any more
    tree.match(other)
    tree.add([7, 7])
    tree.keep([7, 7], 2, state())
    assert tree.match(turns[1])[0] == 4


def test_a_state_above_the_budget_has_no_place():
    tree = PrefixTree(CHUNK, 7)
    tree.add([1, 2])
    tree.keep([1, 2], 2, state())
    assert tree.match([1, 2]) == (0, None)
    assert tree.nbytes == 0


def test_paths_are_bounded_too():
    tree = PrefixTree(CHUNK, 1000, most_tokens=40)
    for i in range(50):
        tree.add([i] * 8)
        tree.keep([i] * 8, 8, state())
        assert tree.tokens <= 40
    assert tree.nbytes == 8 * 5
    assert tree.match([49] * 8)[0] == 8
    assert tree.match([3] * 8)[0] == 0


@pytest.mark.parametrize("length", [0, 1])
def test_a_prompt_below_one_chunk_has_no_place(length):
    tree = PrefixTree(CHUNK, 100)
    tree.add([1] * length)
    assert not tree.wants([1] * length, length)
    assert tree.match([1] * length) == (0, None)
