"""Gradients against finite differences, remat against full, packed rows against rows of their own."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.attention import dispatch
from streamjax.models import Decoder, UniformConfig, stack_layers
from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, assert_same, compiled, gradient, random_batch, random_model


def test_loss_is_the_weighted_mean_of_the_forward_pass(model, batch):
    logits = np.asarray(sj.forward(model, batch["tokens"]), np.float64)
    chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    nll = np.log(np.sum(np.exp(logits), axis=-1)) - chosen
    loss, grads = sj.training.loss_and_grad(model, batch)
    assert float(loss) == pytest.approx(np.sum(nll * batch["weights"]) / np.sum(batch["weights"]), rel=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(model)


def test_gradient_against_central_differences(model, batch):
    _, grads = sj.training.loss_and_grad(model, batch)
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(model))))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), model)

    def loss_at(step):
        return float(sj.training.loss_and_grad(jax.tree.map(lambda x, d: x + step * d, model, direction), batch)[0])

    slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    assert abs(along) > 0.1
    assert along == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("stacked", rest_slow([False, True], True))
def test_remat_gives_the_same_gradient(model, batch, stacked):
    model = stack_layers(model) if stacked else model
    loss, grads = sj.training.loss_and_grad(model, batch, method="full")
    other_loss, other = sj.training.loss_and_grad(model, batch, method="remat", logits_chunk=5)
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_remat_keeps_less(model, batch):
    """With stacked layers: where they are not, the CPU compiler undoes recomputation."""
    config = UniformConfig.from_model_config(model.config).replace(num_layers=4)
    deep = jax.eval_shape(lambda key: Decoder(config, key, scan_layers=True), jax.random.key(0))
    long = {name: np.tile(x, (1, 10)) for name, x in batch.items()}

    def temporary_bytes(method):
        lowered = jax.jit(partial(sj.training.loss_and_grad, method=method)).lower(deep, long)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("remat") < 0.6 * temporary_bytes("full")


def test_packed_rows_give_the_gradient_of_separate_rows(model):
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, model.config.vocab_size, (2, 7)).astype(np.int32)
    apart = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((2, 6), np.float32)}
    packed = {name: x.reshape(1, 12) for name, x in apart.items()}
    packed["segment_ids"] = np.repeat([[1, 2]], 6, axis=1).astype(np.int32)
    packed["positions"] = np.tile(np.arange(6, dtype=np.int32), 2)[None]
    loss, grads = sj.training.loss_and_grad(model, packed)
    expected_loss, expected = sj.training.loss_and_grad(model, apart)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    packed["segment_ids"] = np.ones_like(packed["segment_ids"])
    assert abs(float(sj.training.loss_and_grad(model, packed)[0]) - float(expected_loss)) > 1e-3


def test_a_batch_without_weight_has_no_loss_and_no_gradient_where_its_values_are_not_known(model, batch):
    loss, grads = jax.jit(sj.training.loss_and_grad)(model, batch | {"weights": np.zeros_like(batch["weights"])})
    assert float(loss) == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_errors_say_what_there_is(model, batch):
    with pytest.raises(ValueError, match=r"unknown backprop method 'layers'; use one of full, remat, layer, chunk"):
        sj.training.loss_and_grad(model, batch, method="layers")
    with pytest.raises(ValueError, match="the batch has no 'weights'"):
        sj.training.loss_and_grad(model, {"tokens": batch["tokens"], "targets": batch["targets"]})


@cache
def long_packed_rows():
    """A model, a batch, and its gradient."""
    model, batch = random_model(CONFIG, "float32", stacked=True), random_batch(31, 1, 300, packed=True)
    return model, batch, gradient(model, batch, "full")


@pytest.mark.parametrize(
    ("method", "options", "saved"),
    [
        ("remat", {}, 2),  # loops over blocks of queries, and in it over blocks of keys
        # over the blocks of keys that a chunk sees
        pytest.param("layer", {"chunk_size": 128}, 1, marks=pytest.mark.slow),
        # one chunk lies there: one block
        pytest.param(
            "layer", {"chunk_size": 128, "offload": "host", "offload_fraction": 0.4}, 1, marks=pytest.mark.slow
        ),
    ],
)
def test_attention_that_is_kept_is_not_computed_again(monkeypatch, method, options, saved):
    monkeypatch.setattr(dispatch, "DENSE_LIMIT", 0)
    model, batch, full = long_packed_rows()
    programs = {kept: compiled(model, batch, method, keep_attention=kept, **options) for kept in (False, True)}
    for program in programs.values():
        assert_same(program(model, batch), full, "float32")
    loops = {kept: program.as_text().count(" while(") for kept, program in programs.items()}
    assert loops[True] == loops[False] - saved


def test_what_cannot_keep_attention_says_so(model, batch):
    with pytest.raises(ValueError, match="keep_attention is for the methods"):
        sj.training.loss_and_grad(model, batch, method="chunk", keep_attention=True)
    with pytest.raises(ValueError, match="keep_attention needs the input of every layer, and segment is 2"):
        sj.training.loss_and_grad(model, batch, method="layer", segment=2, keep_attention=True)
    with pytest.raises(ValueError, match="keep_attention is for the methods"):
        sj.training.BackpropConfig(method="full", keep_attention=True)
