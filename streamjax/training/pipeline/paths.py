"""Through which stages a microbatch goes, and in which order.

All stages in order is an ordinary pipeline. SkipPipe (2502.19913) lets each microbatch skip some of them, and swaps
neighbours: residual models bear both while they are trained, and a stage that one microbatch skips has time for others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from streamjax.field_checks import BelowOne, Count, check_fields

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How microbatches go through the stages of a pipeline, along the mesh axis `stage`.

    Attributes:
      skip: the share of the stages that each microbatch skips (SkipPipe); all stages where 0. Each stage is skipped by
        as many microbatches.
      swaps: how many times two stages that follow each other may be swapped in a microbatch's path.
      first: whether no microbatch skips the first stage, nor swaps it, as in the paper. All microbatches then meet
        there, so skipping shortens nothing unless that stage has less to do.
    """

    skip: BelowOne = 0.0
    swaps: Count = 0
    first: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def hops(self, stages: int) -> int:
        """Stages of a microbatch's path; at least one."""
        return max(1, round((1.0 - self.skip) * stages))


WHOLE = PipelineConfig()  # every microbatch through all stages, in order


def candidates(stages: int, config: PipelineConfig) -> list[Path]:
    """Every path that a microbatch may take, those in order first."""
    hops, first = config.hops(stages), (0,) if config.first else ()
    chosen = [first + rest for rest in itertools.combinations(range(len(first), stages), hops - len(first))]
    found: dict[Path, None] = dict.fromkeys(chosen)
    for path in chosen:
        found |= dict.fromkeys(_swapped(path, config.swaps, len(first)))
    return list(found)


def _swapped(path: Path, swaps: int, fixed: int) -> Iterator[Path]:
    """Paths with up to so many swaps of neighbours, none twice."""
    for count in range(1, swaps + 1):
        for places in itertools.combinations(range(fixed, len(path) - 1), count):
            if all(b - a > 1 for a, b in itertools.pairwise(places)):
                swapped = list(path)
                for place in places:
                    swapped[place : place + 2] = path[place + 1], path[place]
                yield tuple(swapped)
