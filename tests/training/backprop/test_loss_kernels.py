"""Losses by kernels, in the TPU interpreter, give what XLA gives: every method, objective and output matrix."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels import api
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training.backprop import loss_kernels
from streamjax.training.objectives.objective import CrossEntropy
from streamjax.training.run.state import shard_batch
from tests.training.gradient_checks import random_batch, random_model

CONFIG = sj.UniformConfig(
    vocab_size=300, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, tie_embeddings=True
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, logit_softcap=4.0, logit_scale=0.7)
SMOOTH = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels are taken for losses, as on a TPU, and counted."""
    calls = []

    def counted(name):
        kernel = getattr(api, name)

        def call(*args, **known):
            calls.append(name)
            return kernel(*args, **known, implementation="tpu", interpret=True)

        monkeypatch.setattr(api, name, call)

    for name in ("token_stats", "token_stats_gradients"):
        counted(name)
    monkeypatch.setattr(platforms, "takes_tokens", lambda width, dtype: True)
    monkeypatch.setattr(loss_kernels, "KERNEL_VOCABULARY", 256)
    monkeypatch.setattr(loss_kernels, "KERNEL_TOKENS", 16)
    jax.clear_caches()
    yield calls
    jax.clear_caches()


def same(found, expected):
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5 * float(jnp.max(jnp.abs(right))) + 1e-7)


def by_xla(monkeypatch, model, batch, **options):
    monkeypatch.setattr(platforms, "takes_tokens", lambda width, dtype: False)
    jax.clear_caches()
    return sj.training.loss_and_grad(model, batch, "full", **options)


@pytest.mark.slow  # on one device; test_on_a_mesh asks the same of four
@pytest.mark.parametrize(
    ("config", "method", "objective"),
    [
        pytest.param(CONFIG, "layer", SMOOTH, id="layer"),
        pytest.param(UNTIED, "chunk", CrossEntropy(), id="chunk-head-capped", marks=pytest.mark.slow),
        pytest.param(UNTIED, "full", SMOOTH, id="full-head-capped"),
        pytest.param(CONFIG, "remat", CrossEntropy(), id="remat", marks=pytest.mark.slow),
    ],
)
def test_same_gradients(kernels, monkeypatch, config, method, objective):
    model, batch = random_model(config, "float32"), random_batch(config.vocab_size, 2, 50, packed=True)
    known = {"chunk_size": 40} if method in ("layer", "chunk") else {}
    found = sj.training.loss_and_grad(model, batch, method, objective=objective, **known)
    assert set(kernels) == {"token_stats", "token_stats_gradients"}
    kernels.clear()
    same(found, by_xla(monkeypatch, model, batch, objective=objective))
    assert not kernels


@pytest.mark.slow
def test_of_adapters(kernels, monkeypatch):
    """The output matrix is a constant then."""
    model = sj.add_lora(random_model(CONFIG, "float32"), 2, 4.0, ("q", "down"), jax.random.key(1))
    model = jax.tree.map(lambda x: x + 0.01, model)
    batch = random_batch(CONFIG.vocab_size, 1, 40)
    found = sj.training.loss_and_grad(model, batch, "layer", chunk_size=20, trainable=sj.LoRAParam)
    assert "token_stats_gradients" in kernels
    same(found, by_xla(monkeypatch, model, batch, trainable=sj.LoRAParam))


@pytest.mark.slow
def test_of_an_objective_of_pairs(kernels, monkeypatch):
    """DPO reads all statistics first, and then their slopes."""
    model = random_model(CONFIG, "float32")
    batch = {**random_batch(CONFIG.vocab_size, 4, 40), "reference_logp": np.zeros(4, np.float32)}
    batch["targets"] = np.maximum(batch["targets"], 0)
    objective = sj.training.DPO()
    found = sj.training.loss_and_grad(model, batch, "layer", objective=objective, chunk_size=20)
    assert set(kernels) == {"token_stats", "token_stats_gradients"}
    same(found, by_xla(monkeypatch, model, batch, objective=objective))


@pytest.mark.parametrize(
    ("axes", "method", "taken"),
    [
        pytest.param({"data": 2, "fsdp": 2}, "layer", True, marks=pytest.mark.slow),
        ({"data": 2, "tensor": 2}, "layer", True),
        pytest.param({"tensor": 4}, "full", True, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, "full", True, marks=pytest.mark.slow),
        ({"context": 2, "tensor": 2}, "layer", True),
        pytest.param({"tensor": 8}, "layer", False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_a_mesh(kernels, monkeypatch, axes, method, taken):
    """Each device has rows of its own, and a part of the vocabulary, where they divide it."""
    model = random_model(UNTIED, "float32", stacked=True)
    batch = random_batch(CONFIG.vocab_size, 4, 40)
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    known = {"objective": SMOOTH, **({"chunk_size": 20} if method == "layer" else {})}
    compute = partial(sj.training.loss_and_grad, method=method, **known)
    with jax.set_mesh(mesh):
        shared = shard_model(model, mesh), shard_batch(batch, mesh)
        found = compute(*shared) if taken else jax.eval_shape(compute, *shared)
    assert bool(kernels) == taken
    if taken:
        same(found, by_xla(monkeypatch, model, batch, objective=SMOOTH))


def test_what_is_left_to_xla(monkeypatch):
    """Small vocabularies, few tokens, wide or odd hidden states, an output with a bias, other platforms."""

    def taken(tokens=512, dtype="float32", vocab_size=loss_kernels.KERNEL_VOCABULARY, **changed):
        config = dataclasses.replace(CONFIG, vocab_size=vocab_size, **changed)
        ends = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0)))
        targets = jnp.zeros((1, tokens), jnp.int32)
        return loss_kernels.applicable(ends, jnp.zeros((1, tokens, config.d_model), dtype), targets)

    assert not taken()
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    assert taken()
    assert taken(dtype="bfloat16", d_model=8192)
    assert not taken(vocab_size=300)
    assert not taken(tokens=255)
    assert not taken(dtype="float16")
    assert not taken(logit_bias=True)
    assert not taken(d_model=8192)
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "triton")
    assert not taken()
