"""A schedule as arrays that a program looks up: what each stage does in each tick."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamjax.training.pipeline.schedule import Schedule, Visit


class Passes(NamedTuple):
    """Forward or backward passes, int32 [ticks, stages].

    microbatch: -1 where the stage has nothing to do. slot: where it keeps the input. first, last: 1 at the ends of the
    microbatch's path.
    """

    microbatch: np.ndarray
    slot: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Arrivals(NamedTuple):
    """What comes to each stage at the end of a phase, by how far away its sender is.

    distances: of receivers from senders, counted in stages, round the end. slots: int32 [ticks, distances, stages],
    where the receiver puts it; the number of slots, one more than there are, where nothing comes.
    """

    distances: tuple[int, ...]
    slots: np.ndarray


class Tables(NamedTuple):
    """Both phases of all ticks."""

    forward: Passes
    backward: Passes
    inputs: Arrivals
    gradients: Arrivals


def tables_of(schedule: Schedule) -> Tables:
    """The arrays of a schedule."""
    by_path: dict[int, dict[int, Visit]] = {}
    for visit in schedule.visits:
        by_path.setdefault(visit.microbatch, {})[visit.hop] = visit
    forward, backward = _empty(schedule), _empty(schedule)
    inputs: list[tuple[int, Visit, Visit]] = []
    gradients: list[tuple[int, Visit, Visit]] = []
    for visit in schedule.visits:
        path = by_path[visit.microbatch]
        _put(backward, visit.backward, visit, len(path))
        if visit.forward is not None:
            _put(forward, visit.forward, visit, len(path))
            inputs.append((visit.forward, visit, path[visit.hop + 1]))
        if visit.hop:
            gradients.append((visit.backward, visit, path[visit.hop - 1]))
    return Tables(forward, backward, _arrivals(schedule, inputs), _arrivals(schedule, gradients))


def _empty(schedule: Schedule) -> Passes:
    shape = schedule.ticks, schedule.stages
    return Passes(np.full(shape, -1, np.int32), *(np.zeros(shape, np.int32) for _ in range(3)))


def _put(passes: Passes, tick: int, visit: Visit, hops: int) -> None:
    place = tick, visit.stage
    assert passes.microbatch[place] == -1, "two microbatches at one stage"
    passes.microbatch[place], passes.slot[place] = visit.microbatch, visit.slot
    passes.first[place], passes.last[place] = visit.hop == 0, visit.hop == hops - 1


def _arrivals(schedule: Schedule, sent: list[tuple[int, Visit, Visit]]) -> Arrivals:
    distance = [(receiver.stage - sender.stage) % schedule.stages for _, sender, receiver in sent]
    distances = tuple(sorted(set(distance)))
    slots = np.full((schedule.ticks, len(distances), schedule.stages), schedule.slots, np.int32)
    for (tick, _, receiver), far in zip(sent, distance, strict=True):
        slots[tick, distances.index(far), receiver.stage] = receiver.slot
    return Arrivals(distances, slots)
