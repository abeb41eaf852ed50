"""The cache of layers that attend within chunks: who is seen at every cut, and what a stream of any length keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamjax.kv import CurrentChunk, KVSpec
from streamjax.kv.description import describe_cache
from tests.kv.tier_streams import Stream, run
from tests.kv.visible_keys import distances


@pytest.mark.quick
@settings(max_examples=12)
@example(size=5, counts=[13], width=15, start=2**32 - 7)
@example(size=6, counts=[3, 0, 3, 6, 1], width=6, start=0)
@given(
    size=st.sampled_from([2, 5, 9]),
    counts=st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(any),
    width=st.just(16),
    start=st.sampled_from([0, 3, 2**32 - 7]),
)
def test_a_query_sees_the_tokens_of_its_own_chunk(size, counts, width, start):
    """Chunks are counted from the first token of the stream, whatever its position, and across 2^32."""
    total = 31
    index = np.arange(total)
    distance = (index[:, None] - index[None]).astype(float)
    seen = (distance >= 0) & (index[:, None] // size == index[None] // size)
    found = distances(CurrentChunk(size), total, counts, width, start)
    np.testing.assert_array_equal(found, np.where(seen, distance, np.nan))


@pytest.mark.parametrize("differentiable", [False, True])
def test_rows_of_a_batch_have_chunks_of_their_own(differentiable):
    """Rotated, soft-capped, with sink logits, in chunks that fill slowly and quickly: as every row by itself."""
    stream, size = Stream.drawn(3, 23), 7
    options = {
        "frequencies": (0.7, 0.2, 0.05),
        "softcap": 2.0,
        "sink_logits": (0.1, -1.0, 2.0, 0.5),
        "differentiable": differentiable,
    }
    together, _ = run(CurrentChunk(size), stream, [(1, 9, 4), (3, 0, 5)], width=9, **options)
    for row in range(3):
        alone = Stream(*(x[row : row + 1] for x in (stream.q, stream.k, stream.v)))
        found = [
            run(CurrentChunk(99), Stream(*(x[:, i : i + size] for x in (alone.q, alone.k, alone.v))), [1], **options)[0]
            for i in range(0, 23, size)
        ]
        np.testing.assert_allclose(together[row], np.concatenate(found, axis=1)[0], atol=1e-5, rtol=0)


def test_what_it_holds():
    cache = CurrentChunk(8)
    assert (cache.slots, cache.span, cache.capacity, cache.reach) == (8, 8, None, 7)
    state = cache.init(KVSpec(2, 3, 4, jnp.dtype(jnp.bfloat16)))
    assert state.k.shape == state.v.shape == (2, 3, 8, 4)
    assert cache.sizes(state) == [(8, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))]
    assert describe_cache(cache) == "CurrentChunk(8)"
    with pytest.raises(ValueError, match=r"CurrentChunk.size is 1: .* use 2 or more"):
        CurrentChunk(1)
    with pytest.raises(ValueError, match=r"CurrentChunk\.size"):
        CurrentChunk(0)
