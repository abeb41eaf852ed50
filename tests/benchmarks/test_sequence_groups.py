"""Lengths of the benchmark of sequence groups: they have the shares that the paper's table states."""

import numpy as np
import pytest

from benchmarks.training.sequence_groups import CONTEXT, LIMITS, SHORTEST, SKRULL, compared, published_lengths
from streamjax.training.sequence_groups.costs import GroupCosts


@pytest.mark.quick
@pytest.mark.parametrize("name", SKRULL)
def test_drawn_lengths_have_the_published_shares(name):
    shares, longest = SKRULL[name]
    drawn = published_lengths(name, 400_000, np.random.default_rng(1))
    below = [float(np.mean(drawn < limit)) for limit in LIMITS[:-1]]
    np.testing.assert_allclose(below, shares[:-1], atol=2e-3)
    assert drawn.min() >= SHORTEST
    assert drawn.max() <= min(longest, CONTEXT)
    assert drawn.max() > 0.7 * min(longest, CONTEXT)


@pytest.mark.quick
def test_one_size_must_hold_the_longest_of_the_data_and_not_of_the_step():
    costs = GroupCosts(quadratic=1e-9, linear=1e-6, exchanged=5e-6, far_exchanged=9e-6, near=4,
                       tokens_per_device=4096)  # fmt: skip
    rows = {row["groups"]: row for row in compared([[900, 700], [5000, 100, 100]], 16384, costs)}
    assert list(rows) == ["planned", *(f"groups of {size}" for size in (4, 8, 16, 32, 64)), "alone"]
    assert rows["groups of 4"]["of the best fixed size"] == 1
    assert rows["alone"]["seconds a step"] < rows["planned"]["seconds a step"] < rows["groups of 4"]["seconds a step"]
