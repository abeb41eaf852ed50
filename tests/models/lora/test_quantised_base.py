"""Adapters over quantised weights (QLoRA): every order of backprop gives the gradient of "full"."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import streamjax as sj
from streamjax.models.lora.adapters import LoRAParam
from streamjax.models.quantisation import QuantisedArray
from streamjax.models.quantising import quantised_model, weights_of
from streamjax.training.backprop.trainable_parameters import partition
from tests.models.test_quantisation import dequantised
from tests.streaming.tiny_models import build

pytestmark = pytest.mark.quick
CONFIG = sj.UniformConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, tie_embeddings=True
)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@functools.cache
def adapted(weights, scan_layers=False):
    base = quantised_model(build(CONFIG, scan_layers=scan_layers), weights)
    model = sj.add_lora(base, 2, 4.0, TARGETS, jax.random.key(1))
    params, rest = partition(model, LoRAParam)
    draw = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), params)
    return sj.training.loss_and_grad, jax.tree.map(
        lambda a, b: b if a is None else a,
        drawn,
        rest,
        is_leaf=lambda x: x is None or isinstance(x, LoRAParam | QuantisedArray),
    )


def batch():
    tokens = np.random.default_rng(3).integers(0, 64, (2, 25)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((2, 24))}


@pytest.mark.usual("layer-True-int8")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    ("method", "scan_layers"),
    [pytest.param("remat", False, marks=pytest.mark.slow), ("layer", True), ("chunk", False)],
)
def test_gradients_are_those_of_the_whole_sequence(weights, method, scan_layers):
    """Over the weights that the codes stand for."""
    loss_and_grad, model = adapted(weights, scan_layers)
    whole, expected = loss_and_grad(dequantised(model), batch(), method="full", trainable=LoRAParam)
    options = {} if method == "remat" else {"chunk_size": 8}
    loss, grads = loss_and_grad(model, batch(), method=method, trainable=LoRAParam, **options)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert len(jax.tree.leaves(grads)) == 2 * len(TARGETS) * (1 if scan_layers else 2)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_gradient_is_that_over_the_dequantised_weights(weights):
    loss_and_grad, model = adapted(weights)
    found = loss_and_grad(model, batch(), method="full", trainable=LoRAParam)
    expected = loss_and_grad(dequantised(model), batch(), method="full", trainable=LoRAParam)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    leaves = zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True)
    assert all(np.allclose(a, b, atol=2e-5) for a, b in leaves)
    assert any(np.abs(a).max() > 1e-3 for a in jax.tree.leaves(found[1]))


def test_moments_are_of_adapters_alone():
    _, model = adapted("int4")
    params, rest = partition(model, LoRAParam)
    state = optax.adam(1e-3).init(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * count + 1
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(rest)} >= {"uint8", "int8", "uint16"}


@pytest.mark.parametrize("save", [sj.save, None])
def test_adapters_over_codes_are_saved_and_loaded(save, tmp_path):
    _, model = adapted("int4")
    tokens = jnp.arange(20)[None]
    expected = sj.forward(model, tokens)
    if save:
        save(model, tmp_path / "model")
        found = sj.load(tmp_path / "model")
        jax.tree.map(np.testing.assert_array_equal, found, model)
    else:
        sj.save_lora(model, tmp_path / "adapters", "base")
        base = quantised_model(build(CONFIG), "int4")
        found = sj.load_lora(base, tmp_path / "adapters")
    assert weights_of(found) == "int4"
    np.testing.assert_allclose(sj.forward(found, tokens), expected, atol=1e-4)


def test_adapters_are_not_merged_into_codes():
    _, model = adapted("int8")
    with pytest.raises(ValueError, match="weights are int8: adapters cannot be merged into them") as error:
        sj.merge_lora(model)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_trains_adapters_over_codes(tmp_path):
    from streamjax.data import DataConfig
    from streamjax.training.run.config import LoRAConfig, TrainConfig
    from streamjax.training.run.loop import train

    base = tmp_path / "base"
    sj.save_hf(sj.Decoder(CONFIG.replace(vocab_size=264), jax.random.key(0)), base)
    config = TrainConfig(
        name="tiny", model=None, init_from=str(base), lora=LoRAConfig(rank=2), weights="int8", steps=2, eval_batches=1,
        data=DataConfig(batch_size=2, seq_len=16),
    )  # fmt: skip
    train(config, tmp_path / "run")
    found = sj.load(tmp_path / "run" / "model")
    assert weights_of(found) == "int8"
    frozen = quantised_model(sj.load(base), "int8")
    np.testing.assert_array_equal(found.layers[0].mlp.up.codes.get_value(), frozen.layers[0].mlp.up.codes.get_value())
    apart = sj.load_lora(sj.load(base, weights="int8"), tmp_path / "run" / "adapters")
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(sj.forward(found, tokens), sj.forward(apart, tokens), atol=1e-4)
    assert np.abs(sj.forward(found, tokens) - sj.forward(frozen, tokens)).max() > 0
    with pytest.raises(ValueError, match=r"weights is 'int8', and quantised weights are not trained: set lora.rank"):
        dataclasses.replace(config, lora=LoRAConfig())
