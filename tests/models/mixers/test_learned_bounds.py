"""Least decays that all layers learn together: by the papers' formula, in every form, and their gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import ModelConfig
from streamjax.models.calibration import output_moments
from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    GatedLinearConfig,
    HGRN2Config,
    HGRNConfig,
    parse_config,
)
from streamjax.models.conversion import converted_config
from streamjax.models.mixers.handed_on.learned_bounds import LearnedBounds, with_bounds
from streamjax.models.mixers.hgrn import rising_bounds
from tests.covering import rest_slow
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream
from tests.training.gradient_checks import assert_same, gradient, random_batch, random_model

VOCAB, LENGTH = 31, 24
SINGLE = HGRNConfig(2, 2, channels=4, lower_bound="learned")
MATRIX = HGRN2Config(2, 2, key_dim=4, value_dim=5, lower_bound="learned")
OTHER = GatedLinearConfig(2, 2, key_dim=4, value_dim=5, rank=3)  # a layer that has no row of the table


def model_of(*mixers):
    return ModelConfig(VOCAB, 16, tuple(BlockConfig(mixer, None) for mixer in mixers))


CONFIG = model_of(SINGLE, OTHER, MATRIX, SINGLE)
REPEATED = model_of(MATRIX, SINGLE, MATRIX, SINGLE, MATRIX)  # two periods of two, and one layer more


def published(table: np.ndarray) -> np.ndarray:
    """2311.04823: gamma^k = sum of P_1 ... P_k, minus P_1, with P the softmax over layers."""
    p = np.exp(table) / np.exp(table).sum(axis=0)
    return np.stack([p[: k + 1].sum(axis=0) - p[0] for k in range(len(p))])


def test_bounds_are_the_published_ones_and_rise():
    with jax.enable_x64(True):
        bounds = LearnedBounds((5, 2, 3), jnp.dtype("float64"))
        np.testing.assert_allclose(np.exp(bounds()[:, 0, 0, 0]), rising_bounds(5), atol=1e-15)
        bounds.table[...] = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)))
        least, rest = np.exp(np.moveaxis(np.asarray(bounds()), 1, 0))
        np.testing.assert_allclose(least, published(np.asarray(bounds.table[...])), atol=1e-15)
        np.testing.assert_allclose(least + rest, 1.0, atol=1e-15)
        assert (np.diff(least, axis=0) > 0).all()


def test_what_the_last_layer_gives_is_measured_for_codes():
    """`weights="int8"` reads the model's layers one by one."""
    model = random_model(CONFIG, "float32")
    random = np.random.default_rng(1)
    moments = output_moments(model, lambda ids: random.standard_normal((len(ids), 16)).astype(np.float32))
    assert moments.shape == (16, 16)
    assert np.abs(moments - np.diag(np.diag(moments))).max() > 0  # and not what stands for a model that cannot be read


@pytest.mark.parametrize("certain", [0, 2, 4])
def test_where_one_layer_takes_all_of_the_way_everything_stays_finite(certain):
    bounds = LearnedBounds((5, 1, 1), jnp.dtype("float32"))
    bounds.table[...] = bounds.table[...].at[certain].set(300.0)
    x = jnp.array([-200.0, 0.0, 200.0])

    def decays(bounds):
        least, rest = jnp.moveaxis(bounds(), 1, 0)
        return jnp.sum(jnp.logaddexp(least[..., 0], rest[..., 0] + jax.nn.log_sigmoid(x)))

    value, grads = jax.jit(jax.value_and_grad(decays))(bounds)
    assert np.isfinite(value)
    assert np.isfinite(grads.table[...]).all()


def test_whole_in_pieces_and_layer_by_layer_it_is_the_published_recurrence():
    model, tokens = build(CONFIG), random_tokens(1, LENGTH) % VOCAB
    given, least = with_bounds(model), published(np.asarray(model.bounds.table[...], np.float64))
    for row, layer in enumerate((0, 2, 3)):
        bound = given.layers[layer].mixer.bound
        np.testing.assert_allclose(np.exp(bound[...][0]), least[row], atol=1e-6)
        bound[...] = jnp.log(jnp.maximum(least[row], 1e-38))[None].repeat(2, axis=0)  # the oracle's, by the formula
    expected = oracle.run(given, tokens[0], oracle.DENSE)
    np.testing.assert_allclose(sj.forward(model, tokens)[0], expected, atol=1e-4)
    start = partial(sj.init_state, model, sj.kv.preset("streaming_llm", sinks=2, window=6))
    np.testing.assert_allclose(read_stream(model, start(), tokens, [5, 1])[1][0], expected, atol=1e-4)
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(expected))[:-1], tokens[0, 1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(sj.score(model, start(), tokens, chunk_size=8)[1][0, 1:], nats, atol=1e-4)
    assert model.layers[0].mixer.bound is None  # what is stored is the table


@pytest.mark.parametrize("order", rest_slow(["full", "chunk", "layer"], "chunk"))
def test_the_table_gets_its_gradient(order):
    """From stacked layers and single ones, of two kinds: that of the loss differentiated as it stands."""
    with jax.enable_x64(True):
        model = random_model(REPEATED, stacked=True)
        batch = random_batch(VOCAB, 1, 11)
        found = gradient(model, batch, order, **({} if order == "full" else {"chunk_size": 4}))
        assert_same(found, _plain(model, batch))
        assert np.abs(np.asarray(found[1].bounds.table[...])).min() > 1e-9


@jax.jit
def _plain(model, batch):
    def loss(model):
        logp = jax.nn.log_softmax(sj.forward(model, batch["tokens"]))
        weights = jnp.where(batch["targets"] < 0, 0, batch["weights"]).astype(logp.dtype)
        chosen = jnp.take_along_axis(logp, jnp.maximum(batch["targets"], 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * weights) / jnp.sum(weights)

    return jax.value_and_grad(loss)(model)


def test_a_checkpoint_has_the_table(tmp_path):
    model = build(CONFIG)
    sj.save(model, tmp_path / "model")
    loaded = sj.load(tmp_path / "model")
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(loaded.bounds.table[...], model.bounds.table[...])


def test_configs():
    assert parse_config(REPEATED.to_json_dict()) == REPEATED
    assert REPEATED.bounds_shape == (5, 2, 4)
    assert REPEATED.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(build(REPEATED, scan_layers=True)))
    with pytest.raises(ValueError, match=r"layer 1 learns bounds of \(2, 3\) .* layer 0 of \(2, 4\)"):
        model_of(SINGLE, HGRNConfig(2, 2, channels=3, lower_bound="learned"))
    with pytest.raises(ValueError, match=r'lower_bound "learned" is read by itself'):
        build(CONFIG).layer(0).mixer.recur(jnp.zeros((1, 1, 16)), build(CONFIG).layer(0).mixer.empty(1, jnp.float32))
    attends = ModelConfig(VOCAB, 16, (BlockConfig(AttentionConfig(2, 1, head_dim=8), None),))
    with pytest.raises(ValueError, match="recurrent has learned bounds"):
        converted_config(attends, (0,), MATRIX)
