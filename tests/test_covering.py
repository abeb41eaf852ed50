"""The ordinary run meets every value of every parameter."""

import itertools
from types import SimpleNamespace

import pytest

from tests.covering import covering_cases, mark_the_rest_slow, on_each

CASES = [
    {"order": order, "stacked": stacked, "bits": bits}
    for order, stacked, bits in itertools.product(["layer", "chunk", "full"], [False, True], [4, 8])
]


def test_every_value_is_met_in_as_few_cases_as_the_longest_list_has():
    chosen = [CASES[index] for index in covering_cases(CASES)]
    assert len(chosen) == 3
    for name in CASES[0]:
        assert {case[name] for case in chosen} == {case[name] for case in CASES}


def test_pairs_are_met_where_they_are_asked_for():
    chosen = [CASES[index] for index in covering_cases(CASES, ["order+stacked", "bits"])]
    assert len(chosen) == 6
    assert len({(case["order"], case["stacked"]) for case in chosen}) == 6
    assert {case["bits"] for case in chosen} == {4, 8}


def test_what_is_not_named_does_not_count():
    assert covering_cases(CASES, ["stacked"]) == [0, 2]


def test_values_are_compared_by_what_they_say():
    assert covering_cases([{"options": {"a": [1]}}, {"options": {"a": [1]}}, {"options": {"a": [2]}}]) == [0, 2]


def test_every_case_is_met_on_some_backend():
    cases = [pytest.param(1, id="one"), pytest.param(2, id="two")]
    made = on_each(["a", "b"], cases, weekly={"a": ["two"]})
    assert [case.values for case in made] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [case.id for case in made if case.marks] == ["two-a"]
    for weekly in ({"a": ["three"]}, {"a": ["one"], "b": ["one"]}):
        with pytest.raises(ValueError, match="is met nowhere"):
            on_each(["a", "b"], cases, weekly=weekly)


class Case:
    """What is asked of a collected case: its marks, its id, and the command line."""

    def __init__(self, id: str, mark: pytest.Mark, *arguments: str):
        self.nodeid, self.marks = f"tests/test_a.py::test_a[{id}]", {mark.name: mark}
        self.callspec, self.config = SimpleNamespace(id=id), SimpleNamespace(args=arguments)

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark


@pytest.mark.parametrize(("kind", "slow"), [(pytest.mark.usual, ["b", "c"]), (pytest.mark.weekly, ["a"])])
def test_cases_are_chosen_by_their_ids(kind, slow):
    cases = [Case(id, kind("a").mark) for id in "abc"]
    mark_the_rest_slow(cases)
    assert [case.callspec.id for case in cases if "slow" in case.marks] == slow


def test_a_case_that_is_named_and_not_there_is_refused():
    with pytest.raises(pytest.UsageError, match=r"test_a has no cases \['d'\]: it has \['a', 'b'\]"):
        mark_the_rest_slow([Case(id, pytest.mark.usual("a", "d").mark) for id in "ab"])
    alone = [Case("b", pytest.mark.usual("a").mark, "tests/test_a.py::test_a[b]")]
    mark_the_rest_slow(alone)
    assert "slow" in alone[0].marks
