"""When each stage does what: a schedule in ticks, in which no two microbatches meet at a stage.

In a tick a stage takes at most one microbatch forwards, and then at most one backwards: 1F1B in lockstep. A microbatch
goes back as soon as it has come to the end of its path, so a stage holds the inputs of few of them at a time, however
many there are. The last stage of a path goes forwards and backwards at once, so it has a backward pass only.

Microbatches are planned one after the other. Each takes, of the paths that it may take, the one on which it is back the
soonest, in slots that those before it have left free. This is done several times, with loads of stages that are even
after each microbatch or only in the end, and the shortest schedule is taken. (SkipPipe plans by conflict-based search,
over nodes with links of different speed. Here stages and links are alike, and planning in turns has no conflict to
resolve.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from streamjax.training.pipeline.paths import WHOLE, Path, PipelineConfig, candidates


@dataclasses.dataclass(frozen=True)
class Visit:
    """A microbatch at one stage of its path.

    hop: place in the path. forward, backward: ticks; the last stage of a path has no forward one. arrival: the tick in
    which its input has come, in the first one that of its forward pass. slot: where the stage keeps it, from then until
    it has gone back.
    """

    microbatch: int
    hop: int
    stage: int
    forward: int | None
    backward: int
    arrival: int
    slot: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Visits of all microbatches.

    stages: how many there are. paths: the stages of each microbatch. visits: all of them. slots: inputs that a stage
    must be able to hold. ticks: how many there are.
    """

    stages: int
    paths: tuple[Path, ...]
    visits: tuple[Visit, ...]
    slots: int
    ticks: int

    def length(self, forward: float = 1.0, backward: float = 3.0) -> float:
        """Time from the first to the last pass, in lockstep: a tick lasts as long as what any stage does in it.

        A backward pass is thrice as long as a forward one where it computes its layers again.
        """
        first = {visit.forward for visit in self.visits if visit.forward is not None}
        return forward * len(first) + backward * len({visit.backward for visit in self.visits})

    def busy(self, forward: float = 1.0, backward: float = 3.0) -> float:
        """Time that the busiest stage computes: no schedule of these paths is shorter."""
        load: defaultdict[int, float] = defaultdict(float)
        for visit in self.visits:
            load[visit.stage] += backward + (forward if visit.forward is not None else 0.0)
        return max(load.values())


_AHEAD = (0, 1, 2, None)


@functools.lru_cache(maxsize=32)
def plan(stages: int, microbatches: int, config: PipelineConfig = WHOLE) -> Schedule:
    """A schedule without collisions: 1F1B, or with `config.skip` one of partial paths.

        plan(4, 16).ticks                                  # 21
        plan(8, 32, PipelineConfig(skip=0.25, swaps=1))    # each stage meets 24 of 32 microbatches

    Raises:
      ValueError: no stage, or no microbatch.
    """
    if stages < 1 or microbatches < 1:
        raise ValueError(f"a pipeline of {stages} stages and {microbatches} microbatches: both must be at least 1")
    if config.hops(stages) == stages and not config.swaps:
        return _planned(stages, microbatches, config, None)
    return min((_planned(stages, microbatches, config, ahead) for ahead in _AHEAD), key=lambda found: found.length())


def _planned(stages: int, microbatches: int, config: PipelineConfig, ahead: int | None) -> Schedule:
    """Microbatches planned in turn; `ahead`: by how much a stage may be ahead of an even load, where possible."""
    allowed = candidates(stages, config)
    fixed = int(config.first)
    free, hops = range(fixed, stages), config.hops(stages) - fixed
    most = math.ceil(microbatches * hops / len(free)) if len(free) else 0
    load: Counter[int] = Counter()
    taken: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())  # (stage, tick) forwards and backwards
    paths, visits = [], []
    for microbatch in range(microbatches):
        rest = microbatches - microbatch - 1
        usual = [path for path in allowed if _even(path, load, most, rest, free, hops)]
        if ahead is not None and hops:
            limit = math.ceil((microbatch + 1) * hops / len(free)) + ahead
            usual = [path for path in usual if all(load[s] < limit for s in path[fixed:])] or usual
        plans = [
            (found[0].backward, max(load[stage] for stage in path), found)
            for path in usual
            for found in [_visits(microbatch, path, *taken)]
        ]
        _, _, found = min(plans, key=lambda plan: plan[:2])
        for visit in found:
            load[visit.stage] += 1
            taken[1].add((visit.stage, visit.backward))
            if visit.forward is not None:
                taken[0].add((visit.stage, visit.forward))
        paths.append(tuple(visit.stage for visit in found))
        visits += found
    placed, slots = _with_slots(visits, stages)
    return Schedule(stages, tuple(paths), placed, slots, 1 + max(visit.backward for visit in visits))


def _even(path: Path, load: Counter[int], most: int, rest: int, free: range, hops: int) -> bool:
    """Whether no stage meets more than `most` microbatches if one takes this path and `rest` others follow.

    free: stages that may be skipped. hops: how many of them a path has.
    """
    room = [most - load[stage] - (stage in path) for stage in free]
    return min(room, default=0) >= 0 and sum(min(count, rest) for count in room) >= rest * hops


def _visits(
    microbatch: int, path: Path, forwards: set[tuple[int, int]], backwards: set[tuple[int, int]]
) -> list[Visit]:
    """The earliest visits of a microbatch beside those that are planned, the first one in front."""
    tick, ahead = 0, []
    for stage in path[:-1]:
        while (stage, tick) in forwards:
            tick += 1
        ahead.append(tick)
        tick += 1
    tick, back = max(tick - 1, 0), []  # what has gone forwards in a tick can go backwards in the same one
    for stage in reversed(path):
        while (stage, tick) in backwards:
            tick += 1
        back.append(tick)
        tick += 1
    back.reverse()
    arrivals = [ahead[0] if ahead else back[0], *ahead]
    return [
        Visit(microbatch, hop, stage, ahead[hop] if hop < len(ahead) else None, back[hop], arrivals[hop])
        for hop, stage in enumerate(path)
    ]


def _with_slots(visits: Sequence[Visit], stages: int) -> tuple[tuple[Visit, ...], int]:
    """Visits with a slot each, that no other visit of the stage has at the same time; and how many are needed."""
    placed, most = [], 1
    for stage in range(stages):
        until: list[int] = []
        for visit in sorted((v for v in visits if v.stage == stage), key=lambda v: v.arrival):
            # Inputs come before a tick's backward passes, so a slot is free in the tick behind its last one.
            slot = next((place for place, last in enumerate(until) if last < visit.arrival), len(until))
            until[slot : slot + 1] = [visit.backward]
            placed.append(dataclasses.replace(visit, slot=slot))
        most = max(most, len(until))
    return tuple(placed), most
