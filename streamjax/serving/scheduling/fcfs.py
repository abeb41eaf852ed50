"""First come, first served."""

from __future__ import annotations

import itertools

from streamjax.serving.scheduling.policy import Work


class FCFS:
    """Requests run to their end in the order in which they came; none is ever preempted."""

    def __init__(self) -> None:
        self._works: dict[Work, None] = {}

    def add(self, work: Work) -> None:
        self._works[work] = None

    def remove(self, work: Work) -> None:
        self._works.pop(work, None)

    def ran(self, work: Work) -> None:
        pass

    def choose(self, rows: int) -> list[Work]:
        return list(itertools.islice(self._works, rows))
