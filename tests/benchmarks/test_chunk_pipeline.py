"""The pipeline of the chunk order: its program has as many ticks as a schedule that is simulated."""

import pytest

from benchmarks.backprop.chunk_pipeline import schedule
from streamjax.training.backprop.context.chunk_pipeline import ticks


@pytest.mark.parametrize(("chunks", "stages"), [(1, 1), (1, 4), (3, 2), (6, 3), (4, 8)])
def test_a_schedule_is_as_long_as_the_program(chunks, stages):
    plan = schedule(chunks, stages)
    assert len(plan) == ticks(chunks, stages) == chunks + stages - 1
    for t, now in enumerate(plan):
        expected = [t - stage if 0 <= t - stage < chunks else None for stage in range(stages)]
        assert now == expected
