"""A side network learns beside a model that stays as it is, along gradients that differences confirm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.side_network import SideConfig, SideDecoder, SideNetwork
from streamjax.streaming.step import advance, surprise
from streamjax.training.heads.side_network import SideTraining, stretches_of, train_side_network
from tests.streaming.tiny_models import GQA, build

CACHE = sj.kv.preset("long_mem", sinks=2, window=6, page=2, capacity=32, top_k=4)
SIDE = SideConfig(layer=1)
TEXT = np.random.default_rng(0).integers(0, GQA.vocab_size, 400)


@pytest.mark.slow
def test_a_step_goes_down_the_slope_of_what_the_tokens_cost_and_moves_nothing_else():
    model = build(GQA)
    own = SideNetwork.beginning(model, SIDE, scale=0.5)
    state, tokens = sj.init_state(SideDecoder(model, own), CACHE, 2), next(stretches_of(TEXT, 2, 24))
    state, _ = sj.step(SideDecoder(model, own), state, jnp.asarray(tokens[:, :16]))  # ten tokens lie in the bank
    rest = jnp.asarray(tokens[:, 16:])

    @jax.jit
    def cost(side):
        whole = SideDecoder(model, side)
        hidden = advance(whole, state, rest, differentiable=True)[1]
        return surprise(whole, state, hidden, rest, jnp.full((2,), 8, jnp.int32)).mean()

    slope, draw = jax.jit(jax.grad(cost))(own), np.random.default_rng(1)
    assert float(jnp.abs(slope.gate[...]).max()) > 1e-5  # the bank is read
    way = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), own)
    step = 2e-3
    there, back = (cost(jax.tree.map(lambda x, y: x + sign * step * y, own, way)) for sign in (1, -1))  # noqa: B023
    along = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(way), strict=True))
    assert along == pytest.approx(float(there - back) / (2 * step), rel=0.03, abs=1e-3)


def test_it_learns_a_text_and_leaves_the_model_alone():
    model = build(GQA)
    before = jax.tree.map(np.array, model)
    config = SideTraining(steps=40, learning_rate=3e-3)
    steps = list(train_side_network(model, SIDE, CACHE, stretches_of(TEXT[:96], 2, 24), config))
    losses = [step.loss for step in steps]
    assert np.mean(losses[-4:]) < np.mean(losses[2:6]) - 0.3
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, model))
    with pytest.raises(ValueError, match="a text of 40 tokens has no 2 parts of 24"):
        next(stretches_of(TEXT[:40], 2, 24))
