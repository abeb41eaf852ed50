"""Experts on meshes: split over a mesh axis of their own or inside, they compute what they do on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, ExpertsConfig, ModelConfig
from streamjax.parallel.mesh import make_mesh, shard_model

BLOCK = BlockConfig(
    mixer=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4), mlp=ExpertsConfig(4, 2, 6, z_loss=0.1)
)
CONFIG = ModelConfig(vocab_size=32, d_model=8, blocks=(BLOCK,))
UP = {
    ("data", "expert"): PartitionSpec(("expert",), None, None, None),
    ("fsdp", "tensor"): PartitionSpec(None, ("fsdp",), None, ("tensor",)),
}


@pytest.mark.parametrize("axes", UP, ids="-".join)
def test_experts_on_a_mesh(axes):
    model = sj.Decoder(CONFIG, jax.random.key(0))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((4, 6), jnp.float32)}
    expected, gradient = sj.forward(model, tokens), sj.training.loss_and_grad(model, batch)[1]
    mesh = make_mesh(**dict.fromkeys(axes, 2), devices=jax.devices()[:4])
    placed = shard_model(model, mesh)
    assert placed.layers[0].mlp.up[...].sharding.spec == UP[axes]
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(sj.forward(placed, tokens), expected, atol=1e-5)
        found = sj.training.loss_and_grad(placed, batch, "chunk", chunk_size=4)[1]
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=1e-5)
