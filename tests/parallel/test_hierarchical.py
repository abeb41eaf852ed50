"""A chunk memory on a mesh: the numbers of one device, its pages split over rows and heads."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import HSAConfig
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.parallel.small_models import BATCH, CONFIG
from tests.training.gradient_checks import random_model

MODEL = CONFIG.replace(
    num_layers=1, windows=(4,), hsa=HSAConfig(layers=(0,), memory_layers=(0,), chunk_size=4, top_k=2)
)


TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, 25)).astype(np.int32)


def on_a_mesh(run, **axes):
    """What `run(model)` gives on one device and on a mesh of eight."""
    model = random_model(MODEL, "float32")
    alone = run(model)
    mesh = make_mesh(**(axes or {"data": 2, "fsdp": 2, "tensor": 2}))
    with jax.set_mesh(mesh):
        return alone, run(shard_model(model, mesh))


def test_a_stream():
    def run(model):
        state = sj.init_state(model, sj.kv.preset("hsa", capacity=24), BATCH)
        for start in (0, 8, 16):
            state, logits = sj.step(model, state, TOKENS[:, start : start + 8])
        return state, logits

    (_, logits), (state, found) = on_a_mesh(run)
    np.testing.assert_allclose(found, logits, atol=2e-5)
    pages = state.layers[0][1].chunks.k
    assert pages.sharding.shard_shape(pages.shape) == (BATCH // 4, CONFIG.num_kv_heads // 2, *pages.shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "axes"), [("layer", {}), ("chunk", {}), ("remat", {"data": 2, "context": 2, "tensor": 2})]
)
def test_gradients(method, axes):
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "weights": np.ones((BATCH, 24), np.float32)}
    alone, split = on_a_mesh(lambda model: sj.training.loss_and_grad(model, batch, method, chunk_size=8), **axes)
    np.testing.assert_allclose(split[0], alone[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(split[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(b).max()), 1e-3))
