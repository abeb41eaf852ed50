import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.query import Query
from tests.kv.tier_streams import SCALE, Stream, plain_attention, run
from tests.oracles.codecs import kivi

Int, FP8, Full, Window, Pages, Scored = sj.kv.Int, sj.kv.FP8, sj.kv.Full, sj.kv.Window, sj.kv.Pages, sj.kv.Scored
CACHES = {
    "staircase": sj.kv.Cascade(sj.kv.Sink(2), Window(20, codec=Int(8, group=4)), Full(64, codec=Int(4, group=8))),
    "pages": sj.kv.Cascade(Window(8), Pages(8, 64, 9, codec=Int(8, group=4))),
    "scored": sj.kv.Cascade(Window(8), Scored(64, sj.kv.KNorm(), every=8, codec=Int(8))),
    "fp8": sj.kv.Cascade(Full(64, codec=FP8())),
}
STREAM = Stream.drawn(2, 61)


@pytest.mark.usual("staircase-0.3", "fp8-0.3")
@pytest.mark.parametrize(
    ("name", "most"),
    [("staircase", 0.3), ("pages", 0.05), pytest.param("scored", 0.05, marks=pytest.mark.slow), ("fp8", 0.3)],
)
def test_a_stream_in_codes_is_near_one_without_and_its_state_is_the_same_however_it_is_cut(name, most):
    out, state = run(CACHES[name], STREAM, [(3, 12), (12, 1)], width=12)
    _, other = run(CACHES[name], STREAM, [1], width=12)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0 < np.abs(out - plain_attention(STREAM)).max() < most  # there is room for all tokens


def test_a_query_attends_to_what_the_slots_hold():
    cache = sj.kv.Cascade(Full(64, codec=Int(4, group=8, residual=8)))
    _, (state,) = run(cache, STREAM, [12], width=12)
    k, v = (kivi_rows(x, role) for x, role in ((STREAM.k, "k"), (STREAM.v, "v")))
    stored = jax.jit(lambda state: cache.tiers[0].stored(state, None))(state)
    np.testing.assert_array_equal(stored.k[:, :, :61], k)
    np.testing.assert_array_equal(stored.v[:, :, :61], v)
    q = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 4, 6)), jnp.float32)
    position = jnp.broadcast_to(jnp.arange(61, 64, dtype=jnp.uint32), (2, 3))
    query = Query(q, q, position, jnp.full((2,), 61, jnp.int32), None, None, SCALE, None)
    found = jax.jit(lambda query, state: cache.tiers[0].attend(state, query, None).out)(query, state)
    logits = np.einsum("bckgd,bksd->bckgs", np.asarray(q).reshape(2, 3, 2, 2, 6), k) * SCALE
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bckgs,bksd->bckgd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(found, expected.reshape(2, 3, 4, 6), atol=1e-5)


def kivi_rows(x, role):
    """[B, n, K, D] as [B, K, n, D], each row and head as a plain loop stores it."""
    rows = [[kivi(x[b, :, h].astype(np.float32), 4, 8, 8, role == "k") for h in range(2)] for b in range(2)]
    return np.array(rows)
