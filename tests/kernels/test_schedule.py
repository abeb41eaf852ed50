"""The grids of the TPU kernels: they visit every pair of blocks that the pattern needs, once, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.tpu.schedule import Grid


def needed(ranges, offset):
    """Pairs (query block, key block) with a visible pair of tokens, and those in which all pairs are, by every pair."""
    query = offset + np.arange(ranges.queries)[:, None]
    key = np.arange(ranges.keys)[None]
    seen = key <= query
    if ranges.window is not None:
        seen &= key > query - ranges.window
    some, every = set(), set()
    for i in range(-(-ranges.queries // ranges.block_q)):
        for j in range(-(-ranges.keys // ranges.block_k)):
            tile = seen[i * ranges.block_q : (i + 1) * ranges.block_q, j * ranges.block_k : (j + 1) * ranges.block_k]
            if tile.any():
                some.add((i, j))
            if tile.all() and tile.shape[1] == ranges.block_k:
                every.add((i, j))
    return some, every


def walk(ranges, offset, traced):
    """All steps of the grid, row by row, as arrays."""
    at = jnp.int32(offset) if traced else offset
    grid = Grid.make(ranges, at)
    row, n = (jnp.asarray(x.ravel(), jnp.int32) for x in np.mgrid[: grid.rows, : int(grid.width)])
    return grid, [np.broadcast_to(np.asarray(x), row.shape) for x in jax.jit(grid.step)(row, n, jnp.int32(offset))]


def check(ranges, offset, traced):
    grid, (outer, inner, first, last, runs) = walk(ranges, offset, traced)
    some, every = needed(ranges, offset)
    pairs = [(j, i) if ranges.transposed else (i, j) for i, j in zip(outer[runs], inner[runs], strict=True)]
    assert len(pairs) == len(set(pairs))
    empty = set(range(ranges.blocks)) - {pair[ranges.transposed] for pair in some}
    extra = [pair for pair in pairs if pair not in some]
    assert some <= set(pairs)
    assert sorted(pair[ranges.transposed] for pair in extra) == sorted(empty)  # they have to write their zeros
    for i, j in pairs:  # a padded query sees what others do not: a tile may be whole without its last rows being real
        assert bool(ranges.interior(i, j, offset)) <= ((i, j) in every)
    if not ranges.queries % ranges.block_q:
        assert sum(bool(ranges.interior(i, j, offset)) for i, j in pairs) == len(every)
    # Each outer block is one run of steps, which its first and last step mark.
    assert sorted(outer[runs & first]) == sorted(outer[runs & last]) == list(range(ranges.blocks))
    for block in range(ranges.blocks):
        mine = np.flatnonzero(runs & (outer == block))
        assert list(mine) == list(range(mine[0], mine[-1] + 1))
        assert first[mine[0]]
        assert last[mine[-1]]
    idle = np.flatnonzero(~runs)
    assert (outer[idle] == outer[idle - 1]).all()  # nothing is loaded or written in a step that does nothing
    assert (inner[idle] == inner[idle - 1]).all()
    assert not (first[idle] | last[idle]).any()
    return grid, len(idle)


@settings(max_examples=12)
@given(
    queries=st.integers(1, 90),
    offset=st.integers(0, 70),
    more=st.integers(-20, 20),
    block_q=st.sampled_from([4, 8, 12]),
    block_k=st.sampled_from([4, 8, 16]),
    window=st.one_of(st.none(), st.integers(1, 60)),
    transposed=st.booleans(),
    traced=st.booleans(),
)
def test_visits_what_the_pattern_needs(queries, offset, more, block_q, block_k, window, transposed, traced):
    keys = max(1, queries + offset + more)
    check(Ranges(queries, keys, block_q, block_k, window, transposed=transposed), offset, traced)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 7, 8])
def test_a_triangle_is_folded_without_idle_steps(blocks, transposed):
    grid, idle = check(Ranges(8 * blocks, 8 * blocks, 8, 8, None, transposed=transposed), 0, False)
    assert grid.steps - idle == blocks * (blocks + 1) // 2
    assert idle <= blocks // 2 + 1


def test_a_windows_grid_grows_with_the_sequence_not_with_its_square():
    steps = [Grid.make(Ranges(n, n, 8, 8, 16), 0).steps for n in (80, 160, 320)]
    assert steps == [30, 60, 120]
