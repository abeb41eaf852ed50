"""Losses of routers: what they add to the gradient, written out with the loss, and the same in every order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, ModelConfig
from streamjax.models.mixers.attention import SequenceContext
from tests.covering import rest_slow
from tests.training import gradient_checks

PLAIN = ExpertsConfig(4, 2, 6)
LOSSES = {"z": {"z_loss": 0.3}, "balance": {"balance_loss": 0.2}, "both": {"z_loss": 0.3, "balance_loss": 0.2}}


def model_config(**losses):
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    mlps = (dataclasses.replace(PLAIN, **losses), DenseConfig(12))
    return ModelConfig(vocab_size=31, d_model=8, blocks=tuple(BlockConfig(mixer=attention, mlp=mlp) for mlp in mlps))


def written_out(model, tokens, z_loss=0.0, balance_loss=0.0):
    """The losses of the model's first layer, which has experts, over all tokens: Switch's formula, and ST-MoE's."""
    block, x = model.layer(0), model.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.uint32), tokens.shape)
    x = x + block.mixer.parallel(block.mixer_norm(x), SequenceContext(positions, None, tokens.shape[1]))
    logits = (block.mlp_norm(x) @ block.mlp.router[...]).reshape(-1, 4)
    chosen = jnp.argsort(-logits, axis=-1)[:, :2]
    share = jnp.array([jnp.mean((chosen == expert).astype(logits.dtype)) for expert in range(4)])
    probabilities = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    balance = 4 * jnp.sum(share * jnp.mean(probabilities, axis=0))
    return z_loss * jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2) + balance_loss * balance


@pytest.mark.parametrize("name", rest_slow(LOSSES, "both"))
def test_the_gradient_is_that_of_the_loss_and_the_routers_losses(name):
    with jax.enable_x64(True):
        model = gradient_checks.random_model(model_config(**LOSSES[name]))
        plain = gradient_checks.random_model(model_config())
        batch = gradient_checks.random_batch(31, 2, 7)
        batch |= {"weights": np.ones((2, 7), np.float32), "targets": batch["tokens"]}

        def loss(model):
            return written_out(model, jnp.asarray(batch["tokens"]), **LOSSES[name])

        @jax.jit
        def apart(plain):
            return sj.training.loss_and_grad(plain, batch), jax.grad(loss)(plain)

        value, grads = gradient_checks.gradient(model, batch, "full")
        (expected_value, expected), added = apart(plain)
        assert float(value) == pytest.approx(float(expected_value), rel=1e-14)
        for mine, theirs, more in zip(*map(jax.tree.leaves, (grads, expected, added)), strict=True):
            np.testing.assert_allclose(mine, theirs + more, atol=1e-12)
        assert jax.tree.structure(grads) == jax.tree.structure(model)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(added)) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stacked", rest_slow([False, True], False))
def test_the_z_loss_is_the_same_in_every_order(stacked):
    """Padding of the last chunk does not count, nor do tokens on which the loss does not depend."""
    config = model_config(z_loss=0.3)
    config = config if stacked else config.replace(blocks=config.blocks[:1])
    gradient_checks.check(config, 13, packed=True, stacked=stacked, chunk_size=5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_the_balancing_loss_is_the_same_where_a_chunk_is_the_sequence():
    config = model_config(z_loss=0.3, balance_loss=0.2)
    gradient_checks.check(config, 9, chunk_size=9)
    gradient_checks.check(config, 9, orders=("remat",))
