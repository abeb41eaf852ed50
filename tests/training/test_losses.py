"""Chunked cross-entropy against plain float64 NumPy, and against itself uncut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.training import chunked_loss, token_nll


def nll_float64(logits, targets):
    """Oracle: a loop over tokens."""
    logits = np.asarray(logits, np.float64)
    out = np.zeros(targets.shape)
    for index in np.ndindex(*targets.shape):
        row = logits[index]
        out[index] = np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[targets[index]]
    return out


@pytest.fixture(scope="module")
def batch(batch):
    return {name: jnp.asarray(x) for name, x in batch.items()}


def hidden_states(batch, width=32):
    shape = (*batch["tokens"].shape, width)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def test_token_nll_and_its_gradient_against_float64():
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(2, 5, 17)) * 30 + 1000).astype(np.float32)
    targets = rng.integers(0, 17, (2, 5)).astype(np.int32)
    found = token_nll(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(found, nll_float64(logits, targets), rtol=1e-4, atol=1e-3)
    small = (rng.normal(size=(2, 5, 17)) * 3).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(token_nll(x, jnp.asarray(targets))))(jnp.asarray(small))
    for index in [(0, 0, 3), (1, 4, 16), (0, 2, int(targets[0, 2]))]:
        up, down = small.astype(np.float64), small.astype(np.float64)
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (nll_float64(up, targets).sum() - nll_float64(down, targets).sum()) / 2e-6
        assert gradient[index] == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 100, None])
def test_chunks_do_not_change_the_loss(model, batch, chunk_size):
    hidden = hidden_states(batch)
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.embedding[...], np.float64).T
    expected = np.sum(nll_float64(logits, np.asarray(batch["targets"])) * np.asarray(batch["weights"]))
    loss = chunked_loss(model, hidden, batch["targets"], batch["weights"], chunk_size=chunk_size)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_chunks_do_not_change_the_gradient(model, batch, chunk_size):
    def gradient(size):
        def loss(model, hidden):
            return chunked_loss(model, hidden, batch["targets"], batch["weights"], chunk_size=size)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(model, hidden_states(batch))

    for cut, whole in zip(jax.tree.leaves(gradient(chunk_size)), jax.tree.leaves(gradient(12)), strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)


def test_a_token_without_weight_has_no_influence_whatever_its_target(model, batch):
    def loss_and_gradient(targets):
        def loss(hidden):
            return chunked_loss(model, hidden, targets, batch["weights"], chunk_size=5)

        return jax.value_and_grad(loss)(hidden_states(batch))

    ignored = jnp.where(batch["weights"] == 0, -100, batch["targets"])
    (loss, gradient), (expected, expected_gradient) = loss_and_gradient(ignored), loss_and_gradient(batch["targets"])
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    np.testing.assert_array_equal(gradient[5], 0.0)


def test_full_logits_never_exist_when_cut(model, batch):
    def compiled(chunk_size):
        def loss(model, hidden):
            return chunked_loss(model, hidden, batch["targets"], batch["weights"], chunk_size=chunk_size)

        return jax.jit(jax.grad(loss)).lower(model, hidden_states(batch)).compile().as_text()

    assert "f32[8,12,61]" in compiled(12)
    assert "f32[8,12,61]" not in compiled(4)
    assert "f32[8,4,61]" in compiled(4)
