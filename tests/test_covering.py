"""The ordinary run meets every value of every parameter."""

import itertools

import pytest

from tests.covering import covering_cases, on_each

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
