"""Tokens that do not count are not projected: the loss and its gradient are those of all logits all the same."""

import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import streamjax as sj
from streamjax.models.layer_stacking import without_layers
from streamjax.parallel.mesh import make_mesh
from streamjax.training.backprop.embedding_and_head import output_partition
from streamjax.training.backprop.head.counted_tokens import TokenBlocks
from streamjax.training.backprop.head.passes import head_gradients, head_stats
from streamjax.training.backprop.head.whole_sequence import whole_sequence_loss
from streamjax.training.objectives.grpo import GRPO
from streamjax.training.objectives.objective import CrossEntropy, TokenStats, token_stats
from tests.training.gradient_checks import CONFIG, random_model

ROWS, LENGTH, BLOCK = 2, 12, 3  # blocks of 3 tokens of both rows, or of 6 tokens of any
SHAPE = (2, ROWS, LENGTH // 2)  # two chunks
OBJECTIVE = CrossEntropy(label_smoothing=0.1, z_loss=0.01)
COUNTED = {
    "all": np.ones((ROWS, LENGTH)),
    "holes": np.array([[0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1]]),
    "two-whole-blocks": np.array([[1] * 6 + [0] * 6, [0] * 6 + [1] * 6]),
    "one-more-than-a-block": np.array([[1] * 7 + [0] * 5, [0] * 12]),
    "an-empty-row": np.array([[0] * 12, [0] * 5 + [1] * 7]),
    "the-last": np.array([[0] * 12, [0] * 11 + [1]]),
    "none": np.zeros((ROWS, LENGTH)),
}


@lru_cache(maxsize=1)
def case():
    """The model without layers, hidden states and targets, in float64."""
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        ends = without_layers(random_model(CONFIG))
        hidden = jnp.asarray(random.standard_normal((ROWS, LENGTH, CONFIG.d_model)))
        targets = random.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        return ends, hidden, targets


def weights_of(name):
    return (COUNTED[name] * np.random.default_rng(1).uniform(0.2, 2.0, (ROWS, LENGTH))).astype(np.float32)


def prepared_of(weights):
    return OBJECTIVE.prepare({"targets": jnp.asarray(case()[2]), "weights": jnp.asarray(weights)})


def chunks(x):
    return jnp.stack(jnp.split(jnp.asarray(x), SHAPE[0], axis=1))


def joined(x):
    return jnp.concatenate(list(x), axis=1)


@jax.jit
def by_all_logits(ends, hidden, prepared):
    """Loss and gradients; `hidden` is before the last norm."""

    def loss(ends, hidden):
        return OBJECTIVE.loss(token_stats(ends.logits(ends.norm(hidden)), prepared["targets"]), prepared)

    return jax.value_and_grad(loss, argnums=(0, 1))(ends, hidden)


@jax.jit
def by_blocks(ends, hidden, prepared):
    """The same, as both orders of chunked backprop have it."""
    params, rest = output_partition(ends, nnx.Param)
    arrays = {name: chunks(x) for name, x in prepared.items()}
    counted, zeros = chunks(OBJECTIVE.counted(prepared)), jax.tree.map(jnp.zeros_like, params)
    stats = head_stats(ends, chunks(hidden), arrays["targets"], counted, BLOCK)
    loss, grads, d_hidden = head_gradients(params, rest, chunks(hidden), arrays, OBJECTIVE, counted, BLOCK, zeros)
    return loss, grads, joined(d_hidden), jax.tree.map(joined, stats)


@jax.jit
def by_jax(ends, hidden, prepared):
    """The same, as methods of `jax.grad` have it."""

    def loss(ends, hidden):
        return whole_sequence_loss(ends, ends.norm(hidden), prepared, OBJECTIVE, BLOCK)

    return jax.value_and_grad(loss, argnums=(0, 1))(ends, hidden)


def close(found, expected):
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", COUNTED)
def test_as_by_all_logits(name):
    """What does not count may be NaN: it is never read."""
    with jax.enable_x64(True):
        ends, hidden, _ = case()
        prepared = prepared_of(weights_of(name))
        loss, (d_ends, d_hidden) = by_all_logits(ends, hidden, prepared)
        hidden = jnp.where(COUNTED[name][..., None] == 1, hidden, jnp.nan)
        found, grads, d_x, stats = by_blocks(ends, hidden, prepared)
        close((found, d_x), (loss, d_hidden))
        close(grads, output_partition(d_ends, nnx.Param)[0])
        assert not np.any(np.asarray(d_x)[COUNTED[name] == 0])
        wanted = token_stats(ends.logits(ends.norm(case()[1])), prepared["targets"])
        close(stats, TokenStats(*(jnp.where(COUNTED[name] == 1, x, 0.0) for x in wanted)))


@pytest.mark.parametrize("name", COUNTED)
def test_derivatives_for_jax(name):
    with jax.enable_x64(True):
        ends, hidden, _ = case()
        prepared = prepared_of(weights_of(name))
        close(by_jax(ends, hidden, prepared), by_all_logits(ends, hidden, prepared))


def test_blocks_behind_the_last_token_that_counts_are_not_run(monkeypatch):
    """Nor does a batch in which nothing counts make any logits."""
    ran, plain = [], sj.Decoder.logits

    def logits(self, hidden):
        jax.debug.callback(lambda: ran.append(hidden.shape))
        return plain(self, hidden)

    monkeypatch.setattr(sj.Decoder, "logits", logits)
    ends = without_layers(random_model(CONFIG, "float32"))
    hidden = jnp.ones((ROWS, LENGTH, CONFIG.d_model))
    compute = jax.jit(jax.value_and_grad(lambda x, p: whole_sequence_loss(ends, x, p, OBJECTIVE, BLOCK)))
    for name in COUNTED:
        ran.clear()
        jax.block_until_ready(compute(hidden, prepared_of(weights_of(name))))
        jax.effects_barrier()
        assert len(ran) == -(-int(COUNTED[name].sum()) // (ROWS * BLOCK)), name
        assert set(ran) <= {(1, ROWS * BLOCK, CONFIG.d_model)}


def test_a_block_copies_nothing_but_itself():
    """The loop takes hidden states from where it puts their cotangents. A copy would cost each block all tokens."""
    ends, shape = without_layers(random_model(CONFIG, "float32")), (16, 1, 512)

    def gradients(ends, hidden, prepared):
        params, rest = output_partition(ends, nnx.Param)
        zeros, counted = jax.tree.map(jnp.zeros_like, params), prepared["weights"] != 0
        return head_gradients(params, rest, hidden, prepared, OBJECTIVE, counted, 64, zeros)

    prepared = {"targets": jnp.zeros(shape, jnp.int32), "weights": jnp.ones(shape)}
    program = jax.jit(gradients).lower(ends, jnp.ones((*shape, CONFIG.d_model)), prepared).compile()
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in copies]
    assert sizes.count(math.prod(shape) * CONFIG.d_model) <= 1  # of the result


def test_what_is_not_trained_costs_no_product():
    """Of adapters the output matrix is a constant: two products for a loss that is a sum, three for one that is not."""
    ends, prepared = without_layers(random_model(CONFIG, "float32")), prepared_of(weights_of("holes"))
    hidden = jnp.ones((ROWS, LENGTH, CONFIG.d_model))

    def products(argnums):
        loss = lambda x, ends: whole_sequence_loss(ends, x, prepared, OBJECTIVE, BLOCK)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums)).lower(hidden, ends).as_text().count("stablehlo.dot_general")

    assert (products((0,)), products((0, 1))) == (2, 3)


def test_tokens_that_count_are_packed():
    counted = jnp.array([[[False, True, False], [True, True, False]]])
    blocks = TokenBlocks.of(counted, (1, 2, 3), 2)
    np.testing.assert_array_equal(blocks.index, [[[1, 3, 4, 9]], [[10, 11, 12, 13]]])
    assert int(blocks.used) == 1
    assert int(TokenBlocks.of(counted, (1, 2, 3), 1).used) == 2
    assert int(TokenBlocks.of(counted & False, (1, 2, 3), 1).used) == 0


def test_rows_stay_together_where_an_objective_does_not_say_what_counts():
    blocks = TokenBlocks.of(None, (1, 2, 5), 3)
    x = blocks.flat(jnp.arange(1, 11).reshape(1, 2, 5))
    np.testing.assert_array_equal(blocks.take(x, 0), [[1, 2, 3], [6, 7, 8]])
    np.testing.assert_array_equal(blocks.take(x, 1), [[4, 5, 0], [9, 10, 0]])
    np.testing.assert_array_equal(blocks.put(x, 1, -blocks.take(x, 1)), [1, 2, 3, -4, -5, 6, 7, 8, -9, -10])


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"context": 2, "fsdp": 2}], ids=str)
def test_on_a_mesh_each_device_has_its_own_blocks(axes):
    """One device has three blocks, another none."""
    with jax.enable_x64(True):
        ends, hidden, _ = case()
        prepared = prepared_of(weights_of("an-empty-row"))
        expected = by_all_logits(ends, hidden, prepared)
        with jax.set_mesh(make_mesh(**axes, devices=jax.devices()[:4])):
            close(by_jax(ends, hidden, prepared), expected)


def test_an_answer_that_was_rewarded_as_its_group_was_is_left_out_without_a_penalty():
    prepared = {"shares": jnp.array([[0.0, 0.5], [0.25, 0.25]]), "advantages": jnp.array([[1.0, 1.0], [0.0, 0.0]])}
    np.testing.assert_array_equal(GRPO(kl=0.0).counted(prepared), [[False, True], [False, False]])
    np.testing.assert_array_equal(GRPO(kl=0.04).counted(prepared), [[False, True], [True, True]])
