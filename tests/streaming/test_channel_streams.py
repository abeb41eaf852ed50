"""Streams under tiers that keep fewer channels: saved, on a mesh, as many bytes as they say, and endless positions."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel import make_mesh, shard_model
from tests.covering import rest_slow
from tests.streaming.tiny_models import GQA, build, random_tokens

CACHES = {
    "shadow_kv": {"keys": 0.5, "window": 4, "page": 4, "top_k": 2, "outliers": 1, "group": 8, "capacity": 64},
    "cskv": {"window": 4, "group": 8, "capacity": 64},
    "think": {"window": 4, "group": 8, "queries": 4, "capacity": 64},
}
TOKENS = random_tokens(2, 40)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.mark.parametrize("name", rest_slow(CACHES, "shadow_kv"))
def test_a_stream_is_saved_and_as_large_as_it_says(model, name, tmp_path):
    cache = sj.kv.preset(name, **CACHES[name])
    state = sj.init_state(model, cache, batch_size=2)
    live = sum(x.nbytes for x in jax.tree.leaves(state))
    assert live == state.cache_bytes == sj.kv.describe(cache, model).total + sj.init_state(model, cache).cache_bytes
    state, _ = sj.score(model, state, TOKENS[:, :24], 8)
    sj.save_stream(state, tmp_path / "stream")
    _, rest = sj.score(model, state, TOKENS[:, 24:], 8)
    state = sj.load_stream(tmp_path / "stream", sj.init_state(model, cache, batch_size=2))
    _, again = sj.score(model, state, TOKENS[:, 24:], 8)
    np.testing.assert_array_equal(again, rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_a_stream_on_a_mesh_is_the_same(model, name):
    cache = sj.kv.preset(name, **CACHES[name])
    _, expected = sj.score(model, sj.init_state(model, cache, batch_size=2), TOKENS, 8)
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        _, found = sj.score(sharded, sj.init_state(sharded, cache, batch_size=2), TOKENS, 8)
    np.testing.assert_allclose(found, expected, atol=2e-3)
