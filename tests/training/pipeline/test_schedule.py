"""Schedules: no two microbatches meet, all go their paths in order, and none is longer than it must be."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.training.pipeline.paths import PipelineConfig, candidates
from streamjax.training.pipeline.schedule import plan
from streamjax.training.pipeline.tables import tables_of


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from((0.0, 0.25, 0.5)),
    st.integers(0, 1),
    st.booleans(),
)
def test_a_schedule_has_no_collisions(stages, microbatches, skip, swaps, first):
    config = PipelineConfig(skip, swaps, first)
    schedule = plan(stages, microbatches, config)
    tables_of(schedule)  # which asserts that a stage has one microbatch a tick and phase
    allowed = set(candidates(stages, config))
    assert len(schedule.paths) == microbatches
    assert set(schedule.paths) <= allowed
    load = Counter(stage for path in schedule.paths for stage in path)
    free, hops = range(int(first), stages), config.hops(stages) - first
    assert all(load[stage] <= math.ceil(microbatches * hops / len(free)) for stage in free)
    for index, path in enumerate(schedule.paths):
        visits = sorted((v for v in schedule.visits if v.microbatch == index), key=lambda v: v.hop)
        assert tuple(v.stage for v in visits) == path
        for before, after in itertools.pairwise(visits):
            assert before.backward > after.backward
            assert before.forward <= after.arrival
            assert after.forward is None or after.forward > before.forward
        assert visits[-1].forward is None
        assert visits[-1].backward >= visits[-1].arrival
    for a in schedule.visits:
        for b in schedule.visits:
            if a is not b and (a.stage, a.slot) == (b.stage, b.slot):
                assert a.backward < b.arrival or b.backward < a.arrival


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 8), (4, 16), (8, 32)])
def test_one_forward_one_backward_takes_no_longer_than_it_must(stages, microbatches):
    schedule = plan(stages, microbatches)
    assert schedule.paths == (tuple(range(stages)),) * microbatches
    forward, backward = 1.0, 3.0
    # The last stage goes forwards in its backward pass.
    assert schedule.length(forward, backward) == (microbatches + stages - 1) * backward + (
        (microbatches + stages - 2) * forward if stages > 1 else 0
    )
    assert schedule.slots == (2 * stages - 2 if stages > 1 else 1)  # however many microbatches


def test_skipping_half_of_the_stages_takes_about_half_of_the_time():
    whole, half = plan(8, 64), plan(8, 64, PipelineConfig(skip=0.5))
    assert half.busy() <= half.length() < 0.6 * whole.length()


def test_known_paths():
    assert candidates(3, PipelineConfig(skip=1 / 3)) == [(0, 1), (0, 2), (1, 2)]
    assert candidates(3, PipelineConfig(swaps=1)) == [(0, 1, 2), (1, 0, 2), (0, 2, 1)]
    assert candidates(4, PipelineConfig(skip=0.5, first=True)) == [(0, 1), (0, 2), (0, 3)]
    assert plan(2, 1).visits[0].forward == 0


def test_nothing_to_plan_is_refused():
    with pytest.raises(ValueError, match=r"^a pipeline of 4 stages and 0 microbatches: both must be at least 1$"):
        plan(4, 0)
