"""Chunked backprop with the platform's kernels, in interpreters: the gradients of the XLA loops, on meshes too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import streamjax as sj
from pallas_kernels import api
from pallas_kernels.api import platforms
from streamjax.attention import dispatch
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training.run.state import shard_batch
from tests.streaming.tiny_models import with_sink_logits
from tests.training.gradient_checks import random_batch, random_model

CONFIG = with_sink_logits(
    sj.UniformConfig(
        vocab_size=31,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=24,
        windows=(None, 90),
        sinks=3,
        attention_softcap=4.0,
    )
)
WINDOW = CONFIG.replace(blocks=CONFIG.blocks[1:])
CHUNK = {"chunk_size": 256}


@pytest.fixture
def kernels(monkeypatch, request):
    """A platform that has kernels, in its interpreter; and which of them were called."""
    called = []

    def instead(name):
        kernel = getattr(api, name)

        def call(*args, **known):
            called.append(name)
            return kernel(*args, **known, interpret=True if request.param == "triton" else pltpu.InterpretParams())

        monkeypatch.setattr(api, name, call)

    for name in ("chunk_attention", "chunk_gradients"):
        instead(name)
    monkeypatch.setattr(platforms, "platform_implementation", lambda: request.param)
    monkeypatch.setattr(dispatch, "choose", lambda *_: "dense")  # of whole sequences
    return called


def assert_same(found, expected):
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)


def take(model, batch, method, **options):
    return jax.jit(partial(sj.training.loss_and_grad, method=method, **options))(model, batch)


@pytest.mark.parametrize(
    ("kernels", "config", "method", "rows", "packed"),
    [
        pytest.param("tpu", CONFIG, "layer", 1, False, id="tpu-layer", marks=pytest.mark.slow),
        pytest.param("triton", CONFIG.replace(blocks=CONFIG.blocks[:1]), "chunk", 2, True, id="triton-one-layer-chunk"),
        pytest.param("triton", CONFIG, "chunk", 2, True, id="triton-chunk", marks=pytest.mark.slow),
        pytest.param("triton", CONFIG, "layer", 2, True, id="triton-layer", marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_gradients_are_those_of_the_loops(kernels, config, method, rows, packed, monkeypatch):
    model, batch = random_model(config, "float32"), random_batch(31, rows, 600, packed=packed)
    found = take(model, batch, method, **CHUNK)
    assert set(kernels) == {"chunk_attention", "chunk_gradients"}
    monkeypatch.setattr(platforms, "platform_implementation", lambda: None)
    assert_same(found, take(model, batch, "full"))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 2, "tensor": 2, "data": 2},
        pytest.param({"tensor": 8}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "data": 4}, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh(kernels, axes, monkeypatch):
    model, batch = random_model(WINDOW, "float32", stacked=True), random_batch(31, 4, 512)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        found = take(shard_model(model, mesh), shard_batch(batch, mesh), "layer", **CHUNK)
    assert bool(kernels) == (axes.get("tensor") != 8)  # two key heads for eight devices: the loops
    monkeypatch.setattr(platforms, "platform_implementation", lambda: None)
    assert_same(found, take(model, batch, "full"))


@pytest.mark.slow
def test_short_chunks_and_odd_dtypes_are_the_loops(monkeypatch):
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    monkeypatch.setattr(api, "chunk_attention", None)
    model, batch = random_model(CONFIG, "float32"), random_batch(31, 1, 300)
    sj.training.loss_and_grad(model, batch, method="layer", chunk_size=128)
