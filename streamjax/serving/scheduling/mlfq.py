"""Skip-join multi-level feedback queue (FastServe, 2305.05920): short answers do not wait for long ones."""

from __future__ import annotations

import dataclasses
import itertools

from streamjax.serving.scheduling.policy import Work


@dataclasses.dataclass
class _Place:
    """Where a request stands. order: of its arrival in the level. used: iterations that it had there; idle: and not."""

    level: int
    order: int
    used: int = 0
    idle: int = 0


class MLFQ:
    """Requests begin urgent, and are less urgent the more they have had.

    A request may have `quantum * 2**level` iterations in a level; then it goes to the next one. It joins at the level
    whose quantum holds its whole prompt: a long prompt skips the levels that it would only use up. One that has not run
    for `patience` iterations goes to the top. Within a level the first come is first.

    Quanta are iterations here and not seconds, so that an order does not depend on the machine.
    """

    def __init__(self, levels: int = 6, quantum: int = 8, patience: int = 512):
        self._levels, self._quantum, self._patience = levels, quantum, patience
        self._order = itertools.count()
        self._places: dict[Work, _Place] = {}

    def add(self, work: Work) -> None:
        level = 0
        while level < self._levels - 1 and work.reading_steps > self._quantum << level:
            level += 1
        self._places[work] = _Place(level, next(self._order))

    def remove(self, work: Work) -> None:
        self._places.pop(work, None)

    def ran(self, work: Work) -> None:
        place = self._places[work]
        place.idle, place.used = 0, place.used + 1
        if place.used >= self._quantum << place.level and place.level < self._levels - 1:
            self._places[work] = _Place(place.level + 1, next(self._order))

    def choose(self, rows: int) -> list[Work]:
        for work, place in self._places.items():
            place.idle += 1
            if place.idle > self._patience:
                self._places[work] = _Place(0, next(self._order))
        urgent = sorted(self._places, key=lambda work: (self._places[work].level, self._places[work].order))
        return urgent[:rows]
