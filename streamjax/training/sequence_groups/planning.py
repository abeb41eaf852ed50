"""Which group of devices reads which sequences of a step (FlexSP, 2412.01523), by a small integer program.

Long sequences need many devices, and short ones lose by being shared: a device then waits for keys of others more than
it computes. So devices are divided into groups of 1, 2, 4, ... for each step anew. An integer program chooses the sizes
and deals out the sequences so that the slowest group is done soonest (HiGHS, by `scipy.optimize.milp`). Where the
devices cannot hold all sequences at once, they are read in rounds of sequences of like lengths.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from streamjax.training.sequence_groups.costs import GroupCosts


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices `first` to `first + degree - 1`, which share the sequences with these numbers."""

    first: int
    degree: int
    sequences: tuple[int, ...]


Round = tuple[Group, ...]
_FEW = 64  # groups times lengths, up to which each group is modelled


@dataclasses.dataclass(frozen=True)
class Plan:
    """Groups of each round, and the seconds that all rounds take one after the other."""

    rounds: tuple[Round, ...]
    seconds: float


def plan_groups(
    lengths: Sequence[int], devices: int, costs: GroupCosts, *, lengths_apart: int = 12, nodes: int = 200
) -> Plan:
    """Groups for sequences of these lengths, never slower than the best groups of one size.

    Args:
      lengths: tokens of each sequence of the step.
      devices: how many there are, a power of two.
      costs: what a group takes.
      lengths_apart: so many lengths are told apart in a round; others count as the next longer one.
      nodes: of the search for a round, after which the best plan that was found counts. A limit of time would give
        each of several processes a plan of its own.

    Raises:
      ValueError: a sequence that all devices together cannot hold; devices that are no power of two.

    Example:
      >>> costs = GroupCosts(quadratic=1e-9, linear=1e-6, exchanged=1e-5, tokens_per_device=4096)
      >>> [(group.degree, group.sequences) for group in plan_groups([8000, 900, 1000], 4, costs).rounds[0]]
      [(2, (0,)), (2, (2, 1))]
    """
    _check(lengths, devices, devices, costs)
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    longest, room = max(lengths, default=0), devices * costs.tokens_per_device
    degrees = [degree for degree in _powers(devices) if longest <= degree * costs.tokens_per_device]
    plans = [fixed_groups(lengths, devices, degree, costs) for degree in degrees]
    fewest = max(1, math.ceil(sum(lengths) / room))
    for count in range(fewest, fewest + 3):  # sequences may not fit into groups of fewer rounds, or barely
        cuts = _cut([lengths[number] for number in order], count, room)
        found = [_solve([lengths[n] for n in order[a:b]], devices, costs, lengths_apart, nodes) for a, b in cuts]
        if found and all(found):
            rounds = [
                tuple(Group(g.first, g.degree, tuple(order[a + n] for n in g.sequences)) for g in groups)
                for (a, _), groups in zip(cuts, found, strict=True)
            ]
            plans.append(_plan(rounds, lengths, costs))
    return min(plans, key=lambda plan: plan.seconds)


def _powers(devices: int) -> list[int]:
    """1, 2, 4, ... up to all devices."""
    return [1 << power for power in range(devices.bit_length())]


def fixed_groups(lengths: Sequence[int], devices: int, degree: int, costs: GroupCosts) -> Plan:
    """Groups of one size, the longest sequences first, each to the group that is done soonest with it and can hold it.

    Raises:
      ValueError: as `plan_groups`; a sequence that a group cannot hold.
    """
    _check(lengths, devices, degree, costs)
    left, rounds = sorted(range(len(lengths)), key=lambda number: -lengths[number]), []
    while left:
        dealt, left = _deal(left, lengths, [degree] * (devices // degree), costs)
        rounds.append(tuple(Group(i * degree, degree, tuple(own)) for i, own in enumerate(dealt) if own))
    return _plan(rounds, lengths, costs)


def _check(lengths: Sequence[int], devices: int, degree: int, costs: GroupCosts) -> None:
    if devices < 1 or devices & (devices - 1):
        raise ValueError(f"{devices} devices: their number must be a power of two")
    if degree < 1 or devices % degree:
        raise ValueError(f"groups of {degree} devices: their size must divide {devices}")
    longest, room = max(lengths, default=0), degree * costs.tokens_per_device
    if longest > room:
        raise ValueError(
            f"a sequence has {longest} tokens, and {degree} devices hold {room}: cut it, or use more devices"
        )
    if min(lengths, default=1) < 1:
        raise ValueError("a sequence has no tokens: leave it out")


def _plan(rounds: Sequence[Round], lengths: Sequence[int], costs: GroupCosts) -> Plan:
    def seconds(group: Group) -> float:
        return costs.group((lengths[number] for number in group.sequences), group.degree)

    return Plan(tuple(rounds), sum(max(map(seconds, groups)) for groups in rounds))


def _cut(lengths: Sequence[int], count: int, room: int) -> list[tuple[int, int]]:
    """Where sorted lengths are cut into rounds of about equally many tokens; nothing where one would not fit."""
    ends = np.cumsum(lengths)
    share = ends[-1] / count if len(lengths) else 0.0
    places = np.searchsorted(ends, share * np.arange(1, count) + 1e-9)
    borders = sorted({0, *places.tolist(), len(lengths)})
    cuts = list(itertools.pairwise(borders))
    return cuts if all(sum(lengths[a:b]) <= room for a, b in cuts) else []


def _solve(lengths: Sequence[int], devices: int, costs: GroupCosts, apart: int, nodes: int) -> tuple[Group, ...]:
    """Groups of one round; lengths are sorted, the longest first. Nothing where none are found.

    Of few sequences on few devices each group is modelled, and the plan is the best there is. Of many only how many
    groups of each size there are, and how many sequences of each length they read together, for a time that is to be
    kept; the shortest such time is found by halving.
    """
    kinds = [part for part in np.array_split(np.arange(len(lengths)), min(apart, len(lengths))) if part.size]
    if len(kinds) * 2 * devices <= _FEW:
        return _by_group(lengths, kinds, devices, costs, nodes)
    longest = np.array([lengths[kind[0]] for kind in kinds], float)
    low = sum(costs.sequence(length, 1) for length in lengths) / devices
    low = max(low, max(min(costs.group([n], degree) for degree in _powers(devices)) for n in longest))
    found: tuple[Group, ...] = ()
    high = 4 * low
    for _ in range(12):
        middle = math.sqrt(low * high)
        tried = (_by_size(lengths, kinds, middle, devices, costs, nodes, filled) for filled in (1.0, 0.9, 0.8))
        groups: tuple[Group, ...] = next(filter(None, tried), ())
        if groups:
            taken = max(costs.group((lengths[n] for n in group.sequences), group.degree) for group in groups)
            found = min((groups, found), key=lambda some: _slowest(some, lengths, costs))
            high = min(middle, taken)
        else:
            low = middle
        if high < 1.01 * low:
            break
    return found


def _slowest(groups: Round, lengths: Sequence[int], costs: GroupCosts) -> float:
    if not groups:
        return math.inf
    return max(costs.group((lengths[number] for number in group.sequences), group.degree) for group in groups)


class _Rows:
    """Linear constraints on integers, one after the other."""

    def __init__(self, variables: int):
        self.variables, self.rows, self.lows, self.highs = variables, [], [], []  # type: ignore[var-annotated]

    def add(self, low: float, high: float, *terms: tuple[np.ndarray | int, np.ndarray | float]) -> None:
        """low <= the sum of the terms (variables, factors) <= high."""
        row = np.zeros(self.variables)
        for where, factor in terms:
            row[where] += factor
        self.rows.append(row)
        self.lows.append(low)
        self.highs.append(high)

    def solve(self, cost: np.ndarray, upper: np.ndarray, nodes: int, integers: int) -> np.ndarray | None:
        """The values of the variables, of which the first `integers` are whole; None where none are found."""
        whole = np.arange(self.variables) < integers
        constraints = LinearConstraint(np.array(self.rows), self.lows, self.highs)
        options = {"node_limit": nodes, "mip_rel_gap": 1e-3}
        found = milp(cost, integrality=whole, bounds=Bounds(0, upper), constraints=constraints, options=options)
        return found.x


def _by_group(
    lengths: Sequence[int], kinds: Sequence[np.ndarray], devices: int, costs: GroupCosts, nodes: int
) -> tuple[Group, ...]:
    """Each group that there could be is used or not, and reads some sequences of each kind."""
    longest, counts = _longest_and_counts(lengths, kinds)
    degrees = [degree for degree in reversed(_powers(devices)) for _ in range(devices // degree)]
    places, shape = len(degrees), (len(kinds), len(degrees))
    dealt = np.arange(places, places + len(kinds) * places).reshape(shape)  # variables: used, dealt, the slowest
    slowest = places + dealt.size
    rows = _Rows(slowest + 1)
    unit = max(costs.group(longest.tolist(), devices), 1e-30)  # so that numbers are near 1
    rows.add(0, devices, (np.arange(places), np.array(degrees, float)))
    for kind, count in enumerate(counts):
        rows.add(count, count, (dealt[kind], 1.0))
    for place, degree in enumerate(degrees):
        each = np.array([costs.sequence(length, degree) for length in longest]) / unit
        start = (degree - 1) * costs.turn / unit
        rows.add(-np.inf, 0, (dealt[:, place], each), (place, start), (slowest, -1.0))
        rows.add(-np.inf, 0, (dealt[:, place], longest / costs.tokens_per_device), (place, -float(degree)))
        if place and degrees[place - 1] == degree:  # of equal groups the first ones are used
            rows.add(0, 1, (place - 1, 1.0), (place, -1.0))
    upper = np.concatenate((np.ones(places), np.repeat(counts, places), [np.inf]))
    values = rows.solve(np.eye(slowest + 1)[slowest], upper, nodes, slowest)
    if values is None:
        return ()
    taken, waiting = np.rint(values[dealt]).astype(int), [kind.tolist() for kind in kinds]
    own = [[waiting[kind].pop(0) for kind in range(len(kinds)) for _ in range(column[kind])] for column in taken.T]
    return _laid_out([(degree, some) for degree, some in zip(degrees, own, strict=True) if some])


def _by_size(
    lengths: Sequence[int],
    kinds: Sequence[np.ndarray],
    seconds: float,
    devices: int,
    costs: GroupCosts,
    nodes: int,
    filled: float,
) -> tuple[Group, ...]:
    """Groups that are done in about `seconds`: how many of each size is the program's, and each is filled in turn.

    filled: the share of their tokens that groups may have if sequences could be cut anywhere.
    """
    longest, counts = _longest_and_counts(lengths, kinds)
    mean = np.array([np.mean([lengths[number] for number in kind]) for kind in kinds])
    degrees = _powers(devices)
    dealt = np.arange(len(degrees), len(degrees) * (1 + len(kinds))).reshape(len(degrees), len(kinds))
    rows, upper = _Rows(len(degrees) + dealt.size), np.zeros(len(degrees) + dealt.size)
    rows.add(0, devices, (np.arange(len(degrees)), np.array(degrees, float)))
    for kind, count in enumerate(counts):
        rows.add(count, count, (dealt[:, kind], 1.0))
    for place, degree in enumerate(degrees):
        most, each = (np.array([costs.sequence(length, degree) for length in some]) for some in (longest, mean))
        time = seconds - (degree - 1) * costs.turn
        rows.add(-np.inf, 0, (dealt[place], each / seconds), (place, -time / seconds))
        rows.add(-np.inf, 0, (dealt[place], mean / costs.tokens_per_device), (place, -filled * degree))
        upper[place] = devices // degree
        upper[dealt[place]] = np.where((most <= time) & (longest <= degree * costs.tokens_per_device), counts, 0)
    values = rows.solve(np.concatenate((np.array(degrees, float), np.zeros(dealt.size))), upper, nodes, len(upper))
    if values is None:
        return ()
    sizes = [degree for degree, many in zip(degrees, values, strict=False) for _ in range(round(many))]
    sizes += [min(sizes)] * ((devices - sum(sizes)) // min(sizes))  # devices that are left
    sizes.sort(reverse=True)
    groups, left = _deal(range(len(lengths)), lengths, sizes, costs)
    return () if left else _laid_out([(size, own) for size, own in zip(sizes, groups, strict=True) if own])


def _longest_and_counts(lengths: Sequence[int], kinds: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([lengths[kind[0]] for kind in kinds], float), np.array([kind.size for kind in kinds], float)


def _deal(
    numbers: Sequence[int], lengths: Sequence[int], sizes: Sequence[int], costs: GroupCosts
) -> tuple[list[list[int]], list[int]]:
    """Sequences, the longest first, each to the group that is done soonest with it and can hold it; who finds none."""
    dealt: list[list[int]] = [[] for _ in sizes]
    seconds, room, left = [0.0] * len(sizes), [size * costs.tokens_per_device for size in sizes], []
    for number in numbers:
        length = lengths[number]
        fits = [i for i in range(len(sizes)) if length <= room[i]]
        if not fits:
            left.append(number)
            continue
        soonest = min(fits, key=lambda i: seconds[i] + costs.sequence(length, sizes[i]))
        dealt[soonest].append(number)
        seconds[soonest] += costs.sequence(length, sizes[soonest])
        room[soonest] -= length
    return dealt, left


def _laid_out(groups: Sequence[tuple[int, list[int]]]) -> tuple[Group, ...]:
    """Groups on devices; the large ones come first, so that each begins at a multiple of its size."""
    firsts = np.cumsum([0, *(degree for degree, _ in groups)]).tolist()
    return tuple(Group(first, degree, tuple(own)) for first, (degree, own) in zip(firsts, groups, strict=False))
