"""Which implementation attention over a sequence takes, and that a model gives the same by all of them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import streamjax as sj
from pallas_kernels.api import platforms
from pallas_kernels.patterns import Full, SinkWindow
from streamjax.attention import dispatch
from tests.streaming.tiny_models import with_sink_logits

CONFIG = with_sink_logits(
    sj.UniformConfig(
        vocab_size=31,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=48,
        windows=(100, None),
        sinks=3,
        attention_softcap=5.0,
    )
)


@pytest.fixture
def on_tpu(monkeypatch):
    """A platform that has the TPU's kernels; they run in the interpreter."""
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    jax.clear_caches()
    with pltpu.force_tpu_interpret_mode():
        yield
    jax.clear_caches()


def test_chooses_by_platform_size_and_arguments(monkeypatch):
    assert dispatch.choose(1000, 1000, Full(), "float32") == "dense"
    assert dispatch.choose(2000, 2000, Full(), "float32") == "xla"
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    assert dispatch.choose(2000, 2000, Full(), "bfloat16") == "pallas"
    assert dispatch.choose(100, 100, Full(), "bfloat16") == "dense"
    assert dispatch.choose(2000, 2000, SinkWindow(5000, 10), "bfloat16") == "xla"
    assert dispatch.choose(2000, 2000, Full(), "float64") == "xla"


def test_logs_its_choice_once(caplog):
    platforms.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=platforms.__name__):
        for _ in range(3):
            dispatch.choose(2000, 2000, Full(), "float32")
    assert [record.getMessage() for record in caplog.records] == ["attention over long sequences: xla, on cpu"]


def test_a_model_with_kernels_gives_the_same_logits_and_gradient(on_tpu, monkeypatch):
    model = sj.Decoder(CONFIG, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 300)), jnp.int32)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1), "weights": jnp.ones(tokens.shape)}
    assert "pallas_call" in str(jax.make_jaxpr(sj.forward)(model, tokens))
    found = sj.forward(model, tokens), sj.training.loss_and_grad(model, batch, method="full")
    monkeypatch.setattr(platforms, "platform_implementation", lambda: None)
    jax.clear_caches()
    assert "pallas_call" not in str(jax.make_jaxpr(sj.forward)(model, tokens))
    expected = sj.forward(model, tokens), sj.training.loss_and_grad(model, batch, method="full")
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)


def test_a_kernel_that_is_not_there_is_an_error():
    x = jnp.ones((1, 8, 1, 64))
    with pytest.raises(ValueError, match="no attention kernel for cpu"):
        dispatch.sequence_attention(x, x, x, Full(), scale=1.0, implementation="pallas")
