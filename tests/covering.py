"""What the ordinary run takes of a test whose parameters multiply: each of their values at least once."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def covering_cases(cases: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> list[int]:
    """Indices of few cases in which each parameter takes all the values that it has, and each "a+b" all of its pairs.

    Always the same: as long as something is missing, the case that brings most of it, and the first of several.

    Args:
      cases: by parameter, the value that it has in each case.
      names: which parameters count, and "a+b" for the pairs of two; all parameters, each by itself, where empty.
    """
    values = [{(name, *(_key(case[part]) for part in name.split("+"))) for name in names or case} for case in cases]
    missing = set().union(*values)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: (len(values[index] & missing), -index))
        missing -= values[best]
        chosen.append(best)
    return sorted(chosen)


def _key(value: Any) -> Hashable:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Leave to the ordinary run the cases that marks of their tests choose; the others are slow.

    `covering` takes what its parameters' values need, of cases that are not slow already; `usual` takes those whose ids
    it names, and `weekly` all but those.

    Raises:
      pytest.UsageError: where a mark names a case that its test does not have.
    """
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        if any(item.get_closest_marker(name) for name in ("covering", "usual", "weekly")):
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in by_function.items():
        for index in _slow_of(name, cases):
            cases[index].add_marker(pytest.mark.slow)


def _slow_of(name: str, cases: Sequence[pytest.Item]) -> set[int]:
    """Indices of the cases of one test that its mark leaves to the weekly run."""
    if mark := cases[0].get_closest_marker("covering"):
        rest = [index for index, item in enumerate(cases) if not item.get_closest_marker("slow")]
        kept = covering_cases([cases[index].callspec.params for index in rest], mark.args)
        return {index for place, index in enumerate(rest) if place not in kept}
    usual, weekly = (cases[0].get_closest_marker(kind) for kind in ("usual", "weekly"))
    named, ids = (usual or weekly).args, [item.callspec.id for item in cases]
    only_some = any("[" in argument for argument in cases[0].config.args)  # the command line names single cases
    if not only_some and (unknown := set(named) - set(ids)):
        raise pytest.UsageError(f"{name} has no cases {sorted(unknown)}: it has {ids}")
    return {index for index, found in enumerate(ids) if (found in named) != bool(usual)}


def rest_slow(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values of a parameter, for `parametrize`: of these the ordinary run takes those that are named, each needed."""
    values = list(values)
    unknown = [value for value in kept if value not in values]
    if unknown or not kept:
        raise ValueError(f"{unknown or 'nothing'} to be kept of {values}")
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def on_each(backends: Iterable[str], cases: Iterable[Any], *, weekly: Mapping[str, Sequence[str]]) -> list[Any]:
    """Every case (`pytest.param` with an id) on every backend, which comes first of the parameters, for `parametrize`.

    Of a backend those are slow whose ids `weekly` names: what is in them is met on another backend, and the shapes and
    options of this one's kernels in its other cases.
    """
    backends, cases = list(backends), list(cases)
    unknown = {name for names in weekly.values() for name in names} - {case.id for case in cases}
    if unknown or any(set(backends) <= {b for b in weekly if case.id in weekly[b]} for case in cases):
        raise ValueError(f"{unknown or 'a case'} is met nowhere")
    return [
        pytest.param(
            backend, *case.values, id=f"{case.id}-{backend}",
            marks=[*case.marks, *[pytest.mark.slow] * (case.id in weekly.get(backend, ()))],
        )
        for case in cases  # the backends in turn: what they are compared with is computed once
        for backend in backends
    ]  # fmt: skip
