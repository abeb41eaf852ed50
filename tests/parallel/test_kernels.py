"""Kernels on a mesh, in interpreters: each device calls one on its share, and the numbers are those of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels import api
from pallas_kernels.patterns import SinkWindow
from streamjax.attention import sharded
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.parallel.small_models import BATCH, CACHES, CONFIG, MESHES, one_layer

PAGES = sj.kv.preset("quest", sinks=2, window=3, capacity=24, page=8, top_k=2)
INTERPRETED = {"implementation": "triton", "interpret": True}


@pytest.fixture
def interpreted(monkeypatch):
    """The GPU's kernels in their interpreter; and the shapes of the queries with which they were called."""
    shapes = []
    jax.clear_caches()  # what other cases have compiled would not call them again

    def instead(name, **more):
        kernel = getattr(api, name)

        def call(q, *args, **known):
            shapes.append(q.shape)
            return kernel(q, *args, **known, **INTERPRETED, **more)

        monkeypatch.setattr(api, name, call)

    for name in ("decode_attention", "paged_attention", "hsa_attention"):
        instead(name)
    instead("flash_attention", block_q=16, block_k=16)
    return shapes


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Query and key heads: split, fewer key heads than devices, and a number of them that no split suits.
@pytest.mark.usual("axes3-4-2-share3")
@pytest.mark.parametrize(
    ("axes", "heads", "kv_heads", "share"),
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 4, 2, (1, 64, 2), marks=pytest.mark.slow),
        ({"data": 2, "tensor": 4}, 4, 1, (2, 64, 1)),
        pytest.param({"data": 2, "tensor": 4}, 6, 3, (2, 64, 6), marks=pytest.mark.slow),
        ({"context": 4, "tensor": 2}, 4, 2, (4, 16, 2)),
    ],
)
def test_flash_attention(interpreted, axes, heads, kv_heads, share):
    q, k, v, d_out = (drawn(4, 64, n, 16, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads, heads)))
    ids = jnp.asarray(np.sort(np.random.default_rng(4).integers(0, 3, (4, 64))), jnp.int32)
    known = {"segment_ids": ids, "slopes": jnp.linspace(0.1, 0.5, heads), "scale": 0.25, "softcap": 3.0}

    def loss(q, k, v, attention):
        return jnp.sum(attention(q, k, v, SinkWindow(3, 20), **known).out * d_out)

    expected = jax.jit(jax.value_and_grad(partial(loss, attention=api.flash_attention), (0, 1, 2)))(q, k, v)
    with jax.set_mesh(make_mesh(**axes)):
        found = jax.jit(jax.value_and_grad(partial(loss, attention=sharded.flash_attention), (0, 1, 2)))(q, k, v)
    assert interpreted[-1][:3] == share
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-4)


@pytest.mark.usual("data2-fsdp2-tensor2-quest-1")
@pytest.mark.parametrize("prompt", [1, 14])
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param("data2-fsdp2-tensor2", "streaming_llm", marks=pytest.mark.slow),
        pytest.param("data2-tensor4", "dense", marks=pytest.mark.slow),
        ("data2-fsdp2-tensor2", "quest"),
        ("context2-tensor4", "dense"),
        pytest.param("data2-tensor4", "streaming_llm", marks=pytest.mark.slow),
        pytest.param("data2-fsdp2-tensor2", "dense", marks=pytest.mark.slow),
        pytest.param("data2-tensor4", "quest", marks=pytest.mark.slow),
    ],
)
def test_decoding(interpreted, name, cache, prompt):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, 24)).astype(np.int32)

    def logits(model, implementation):
        state = sj.init_state(model, CACHES.get(cache, PAGES), BATCH, implementation=implementation)
        state, _ = sj.step(model, state, tokens[:, :prompt])
        out = []
        for i in range(prompt, 24):
            state, found = sj.step(model, state, tokens[:, i : i + 1])
            out.append(np.asarray(found))
        return np.concatenate(out, axis=1)

    expected = logits(one_layer(), "xla")
    assert not interpreted
    mesh = make_mesh(**MESHES[name])
    with jax.set_mesh(mesh):
        found = logits(shard_model(one_layer(), mesh), "pallas")
    rows = MESHES[name].get("data", 1) * MESHES[name].get("fsdp", 1)
    assert interpreted[-1] == (BATCH // rows, 1, CONFIG.num_heads // MESHES[name]["tensor"], CONFIG.head_dim)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rings_on_several_devices_are_not_for_kernels(interpreted):
    mesh = make_mesh(**MESHES["context2-tensor4"])
    with jax.set_mesh(mesh):
        model = shard_model(one_layer(), mesh)
        state = sj.init_state(model, CACHES["streaming_llm"], BATCH, implementation="pallas")
        with pytest.raises(ValueError, match="do not take slots on several devices"):
            sj.step(model, state, np.zeros((BATCH, 1), np.int32))


def test_chosen_chunks(interpreted):
    rows, count, size, heads, kv_heads, width = 4, 6, 8, 4, 2, 16
    chunks = LandmarkPages(
        k=drawn(rows, kv_heads, count, size, width),
        v=drawn(rows, kv_heads, count, size, width, seed=1),
        landmarks=drawn(rows, kv_heads, count, width, seed=2),
    )
    q, retrieval = drawn(rows, 12, heads, width, seed=3), drawn(rows, 12, kv_heads, width, seed=4)
    number = jnp.broadcast_to(jnp.arange(count), (rows, count))
    visible = VisiblePages(number, jnp.broadcast_to(jnp.arange(12) // 2, (rows, 12)))

    def read(implementation):
        def loss(q, chunks):
            found = chunks.read(q, retrieval, visible, top_k=2, scale=0.3, implementation=implementation)
            return jnp.sum(jnp.sin(found))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(q, chunks)

    expected = read("dense")
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        found = read("pallas")
    assert interpreted[-1] == (2, 6, 2, width)
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5)
