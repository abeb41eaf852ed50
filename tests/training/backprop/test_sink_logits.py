"""Learned sink logits backwards: chunked orders against the whole sequence, and that against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels.patterns import SinkWindow
from streamjax.attention.dispatch import sequence_attention
from tests.covering import rest_slow
from tests.streaming.tiny_models import with_sink_logits
from tests.training.gradient_checks import CONFIG, ORDERS, assert_same, check, gradient, random_batch, random_model

MIXED = CONFIG.replace(windows=(5, None), sinks=2, attention_softcap=3.0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("config", "packed", "stacked"),
    [
        pytest.param(MIXED.replace(num_layers=1, windows=(5,)), True, False, id="window-packed"),
        pytest.param(MIXED, True, False, id="windows-packed", marks=pytest.mark.slow),
        pytest.param(CONFIG, False, True, id="full-stacked", marks=pytest.mark.slow),
    ],
)
def test_both_orders_give_the_gradient(config, packed, stacked):
    check(with_sink_logits(config), 21, chunk_size=6, packed=packed, stacked=stacked)


def test_the_gradient_of_the_sinks_by_differences():
    """Of the loss by each head's logit, with each implementation of attention; they are not small."""
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        q, k, v, weights = (jnp.asarray(random.standard_normal((2, 9, heads, 4))) for heads in (4, 2, 2, 4))
        sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])

        def loss(sinks, implementation="dense"):
            out = sequence_attention(
                q, k, v, SinkWindow(1, 4), scale=0.7, sink_logits=sinks, implementation=implementation
            )
            return jnp.sum(out * weights)

        costs = jax.jit(loss)
        for implementation in ("dense", "xla"):
            found = jax.jit(jax.grad(loss), static_argnums=1)(sinks, implementation)
            for head in range(4):
                up, down = (costs(sinks.at[head].add(step)) for step in (1e-5, -1e-5))
                np.testing.assert_allclose(found[head], (up - down) / 2e-5, rtol=1e-6)
            assert np.abs(found).min() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("order", rest_slow(ORDERS, "layer"))
def test_adapters_beside_sinks_that_are_constants(order):
    with jax.enable_x64(True):
        model = sj.add_lora(random_model(with_sink_logits(CONFIG)), 2, 4.0, ("q", "o"), jax.random.key(0))
        batch, trained = random_batch(31, 1, 10), {"trainable": sj.LoRAParam}
        expected = gradient(model, batch, "full", **trained)
        assert_same(gradient(model, batch, order, **trained, chunk_size=4), expected)


@pytest.mark.slow
def test_trained_on_a_stream():
    """Through a cache that holds everything, in chunks, the gradient is that of the whole sequence."""
    with jax.enable_x64(True):
        model, batch = random_model(with_sink_logits(CONFIG)), random_batch(31, 2, 10)
        state = sj.init_state(model, sj.kv.preset("dense", capacity=10), 2)
        loss, grads, _ = sj.training.streaming_loss_and_grad(model, state, batch, chunk_size=4)
        expected = gradient(model, batch, "full")
    assert_same((loss, grads), expected, "float32")
