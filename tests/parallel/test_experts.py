"""Experts on meshes: each device sends all tokens through its own experts; values and gradients are one device's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, ModelConfig
from streamjax.models.layer_stacking import unstack_layers
from streamjax.models.mlps import expert_parallel
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import shard_batch
from streamjax.training.backprop.routing import trainable_and_reports, with_reports
from tests.covering import rest_slow
from tests.training.gradient_checks import random_model

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)
MLPS = {
    "plain": ExpertsConfig(4, 2, 6, z_loss=0.1),
    "inputs": ExpertsConfig(4, 2, 6, weighted="inputs"),
    "biased": ExpertsConfig(4, 3, 6, bias=True, router_bias=True, swiglu_limit=1.0, shared=DenseConfig(6)),
}
MESHES = {
    "expert4": {"expert": 4},
    "data2-expert2-tensor2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp2-tensor2": {"fsdp": 2, "tensor": 2},
    "context2-expert4": {"context": 2, "expert": 4},
}
UP = {
    "expert4": ("expert", None, None, None),
    "fsdp2-expert2-tensor2": ("expert", "fsdp", None, "tensor"),
}
ORDERS = {
    "full": {"method": "full"},
    "remat": {"method": "remat"},
    "layer": {"method": "layer", "chunk_size": 4},
    "chunk": {"method": "chunk", "chunk_size": 4},
}
CASES = [
    pytest.param("expert4", "biased", "full", marks=pytest.mark.slow),
    ("context2-expert4", "inputs", "full"),
    pytest.param("fsdp2-tensor2", "plain", "chunk", marks=pytest.mark.slow),
    pytest.param("data2-expert2-tensor2", "biased", "remat", marks=pytest.mark.slow),
    pytest.param("data2-expert2-tensor2", "plain", "chunk", marks=pytest.mark.slow),
    ("data2-expert2-tensor2", "plain", "full"),
    pytest.param("fsdp2-expert2-tensor2", "plain", "full", marks=pytest.mark.slow),
    pytest.param("fsdp2-expert2-tensor2", "biased", "layer", marks=pytest.mark.slow),
]


def model_of(name: str, layers: int = 2) -> sj.Decoder:
    blocks = (BlockConfig(mixer=ATTENTION, mlp=MLPS[name]),) * layers
    return random_model(ModelConfig(vocab_size=32, d_model=8, blocks=blocks), "float32", stacked=True)


def mesh_of(name: str) -> jax.sharding.Mesh:
    axes = MESHES[name]
    return make_mesh(**axes, devices=jax.devices()[: np.prod(list(axes.values()))])


@pytest.fixture
def small_pieces(monkeypatch):
    """Choices of a device in several pieces, as they are where there are many."""
    for name, value in {"_LEAST": 4, "_ROUND": 4}.items():
        monkeypatch.setattr(expert_parallel, name, value)


@pytest.mark.usual("data2-expert2-tensor2-plain-full")
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("axes", "name", "order"), CASES)
def test_the_gradient_is_that_of_one_device(axes, name, order):
    model, mesh = model_of(name), mesh_of(axes)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (4, 6)), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((4, 6), jnp.float32)}
    model, options = with_reports(model), {"trainable": trainable_and_reports(nnx.Param)}
    expected, gradient = sj.training.loss_and_grad(model, batch, **options)
    placed = shard_model(model, mesh)
    if axes in UP:
        assert placed.stack[0].mlp.up[...].sharding.spec[1:] == UP[axes]
    with jax.set_mesh(mesh):
        loss, found = sj.training.loss_and_grad(placed, shard_batch(batch, mesh), **ORDERS[order], **options)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for mine, theirs, param in zip(*map(jax.tree.leaves, (found, gradient, placed)), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=1e-5, rtol=1e-6)
        if order in ("layer", "chunk"):
            assert mine.sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize("rows", rest_slow([1, 4], 4))
def test_streams(rows):
    """Rows that the expert axis splits, and one that it does not: decoding gathers tokens, and no weights."""
    model, mesh = unstack_layers(model_of("biased", layers=1)), mesh_of("data2-expert2-tensor2")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 32, (rows, 7)), jnp.int32)
    cache = sj.kv.preset("dense", capacity=8)
    expected = sj.forward(model, tokens)
    with jax.set_mesh(mesh):
        placed = shard_model(model, mesh)
        state, logits = sj.step(placed, sj.init_state(placed, cache, rows), tokens[:, :6])
        np.testing.assert_allclose(logits, expected[:, :6], atol=1e-5)
        count = jnp.ones((rows,), jnp.int32)
        program = sj.step.trace(placed, state, tokens[:, 6:], count).lower().compile()
        compiled = program.as_text()
        _, logits = program(placed, state, tokens[:, 6:], count)
    np.testing.assert_allclose(logits[:, 0], expected[:, 6], atol=1e-5)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled)
    assert {shape.split(",")[-1] for shape in gathered} <= {"8", "3"}  # channels of tokens, and their choices
    assert {shape.split(",")[0] for shape in gathered} == ({str(rows // 2)} if rows > 1 else set())
