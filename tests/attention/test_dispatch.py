"""Which implementation attention over a sequence takes, and that a model gives the same by all of them."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import streamjax as sj
from pallas_kernels import api, reference
from pallas_kernels.api import platforms
from pallas_kernels.patterns import Chunked, Full, SinkWindow
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
    assert dispatch.choose(511, 511, Full(), "float32") == "dense"
    assert dispatch.choose(512, 512, Full(), "float32") == "xla"
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


@pytest.mark.slow
def test_a_model_with_kernels_gives_the_same_loss_and_gradient(on_tpu, monkeypatch):
    model = sj.Decoder(CONFIG, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (1, 300)), jnp.int32)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1), "weights": jnp.ones(tokens.shape)}
    assert "pallas_call" in str(jax.make_jaxpr(sj.forward)(model, tokens))
    found = sj.training.loss_and_grad(model, batch, method="full")
    monkeypatch.setattr(platforms, "platform_implementation", lambda: None)
    jax.clear_caches()
    assert "pallas_call" not in str(jax.make_jaxpr(sj.forward)(model, tokens))
    expected = sj.training.loss_and_grad(model, batch, method="full")
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)


def chunked(length, rows=2, heads=4, kv_heads=2, width=64):
    """Arrays of a packed sequence, what they go with, and what a loss weighs its outputs by."""
    random = np.random.default_rng(length)
    shapes = (rows, length, heads, width), *[(rows, length, kv_heads, width)] * 2
    arrays = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    ids = jnp.asarray(np.sort(random.integers(0, 3, (rows, length)), axis=1), jnp.int32)
    options = {"scale": 0.2, "softcap": 5.0, "slopes": jnp.float32([0.3, 0.1, 0.02, 0.0]), "segment_ids": ids}
    return arrays, options, jnp.asarray(random.standard_normal(shapes[0]), jnp.float32)


def paired(options):
    """The options of the reference, which has ids of queries and of keys."""
    return {**options, "segment_ids": (options["segment_ids"],) * 2}


def weighed(attention, weights):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attention(*x) * weights), argnums=(0, 1, 2)))


@pytest.mark.covering
@pytest.mark.parametrize("length", [7, 16, 48, 53])
@pytest.mark.parametrize("implementation", [None, "dense", "xla"])
def test_attention_within_chunks(length, implementation):
    """Chunks as rows of their own, and a rest: the reference's outputs and gradients, packed, capped, with ALiBi."""
    arrays, options, weights = chunked(length)
    sinks = jnp.float32([0.5, -1.0, 2.0, 0.0])

    def plain(*x):
        return reference.flash_attention(*x, Chunked(16), **paired(options), sink_logits=sinks).out

    def ours(*x):
        return dispatch.sequence_attention(*x, Chunked(16), **options, sink_logits=sinks, implementation=implementation)

    for found, right in zip(*(jax.tree.leaves(weighed(f, weights)(*arrays)) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)


@pytest.mark.slow
def test_attention_within_chunks_by_a_kernel(on_tpu):
    """The kernels take chunks as rows with full attention, and refuse the pattern itself."""
    arrays, options, weights = chunked(2 * 256 + 30, rows=1)
    plain = partial(reference.flash_attention, pattern=Chunked(256), **paired(options))
    ours = partial(dispatch.sequence_attention, pattern=Chunked(256), **options)
    assert "pallas_call" in str(jax.make_jaxpr(ours)(*arrays))
    expected = weighed(lambda *x: plain(*x).out, weights)(*arrays)
    for found, right in zip(*map(jax.tree.leaves, (weighed(ours, weights)(*arrays), expected)), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)
    assert not platforms.takes(Chunked(256), "float32")
    assert not platforms.takes_buffer(Chunked(256), 1024, 64, "float32")
    for implementation in ("tpu", "triton"):
        with pytest.raises(ValueError, match=r"Chunked\(size=256\): the kernels take its chunks as rows"):
            api.flash_attention(*arrays, Chunked(256), implementation=implementation, interpret=True)


def test_a_kernel_that_is_not_there_is_an_error():
    x = jnp.ones((1, 8, 1, 64))
    with pytest.raises(ValueError, match="no attention kernel for cpu"):
        dispatch.sequence_attention(x, x, x, Full(), scale=1.0, implementation="pallas")
