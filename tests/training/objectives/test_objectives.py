"""Cross-entropy against plain float64 NumPy, its statistics cut against uncut, and with every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.training import METHODS, CrossEntropy
from streamjax.training.backprop.head.whole_sequence import whole_sequence_stats
from streamjax.training.objectives.objective import token_stats
from tests.covering import rest_slow
from tests.training.gradient_checks import TWO_METHODS, check_objective, random_batch

OBJECTIVES = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.3),
    CrossEntropy(z_loss=0.2),
    CrossEntropy(label_smoothing=0.1, z_loss=0.05, ignore_index=7),
]


def log_sum_exp(row):
    return np.log(np.sum(np.exp(row - row.max()))) + row.max()


def cross_entropy_float64(objective, logits, targets, weights):
    """Oracle: a loop over tokens, the target a distribution over the vocabulary."""
    logits, total, loss = np.asarray(logits, np.float64), 0.0, 0.0
    for index in np.ndindex(*targets.shape):
        if targets[index] == objective.ignore_index or weights[index] == 0:
            continue
        vocab_size = logits.shape[-1]
        wanted = np.full(vocab_size, objective.label_smoothing / vocab_size)
        wanted[targets[index]] += 1 - objective.label_smoothing
        lse = log_sum_exp(logits[index])
        loss += weights[index] * (np.sum(wanted * (lse - logits[index])) + objective.z_loss * lse**2)
        total += weights[index]
    return loss / total


def small_case(seed=2):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(2, 6, 17)) * 3
    targets = random.integers(0, 17, (2, 6)).astype(np.int32)
    weights = random.uniform(0.2, 2.0, (2, 6)).astype(np.float32)
    targets[0, 1], targets[1, 4], weights[1, 2] = -100, 7, 0.0
    return logits, targets, weights


def loss_of(objective, logits, targets, weights):
    prepared = objective.prepare({"targets": jnp.asarray(targets), "weights": jnp.asarray(weights)})
    return objective.loss(token_stats(logits, prepared["targets"]), prepared)


value_and_gradient = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cross_entropy_and_its_gradient_against_float64(objective):
    logits, targets, weights = small_case()
    if objective.ignore_index == 7:
        targets[0, 1] = 3  # -100 would be a target like any other
    with jax.enable_x64(True):
        found, slopes = value_and_gradient(objective, jnp.asarray(logits), targets, weights)
        slopes = np.asarray(slopes)
    assert float(found) == pytest.approx(cross_entropy_float64(objective, logits, targets, weights), rel=1e-7)
    for index in np.ndindex(2, 6):
        up, down = logits.copy(), logits.copy()
        up[(*index, 5)] += 1e-6
        down[(*index, 5)] -= 1e-6
        difference = cross_entropy_float64(objective, up, targets, weights)
        difference -= cross_entropy_float64(objective, down, targets, weights)
        assert float(slopes[(*index, 5)]) == pytest.approx(difference / 2e-6, abs=1e-7)


def test_statistics_of_large_logits():
    random = np.random.default_rng(2)
    logits = (random.normal(size=(2, 5, 17)) * 30 + 1000).astype(np.float32)
    targets = random.integers(0, 17, (2, 5)).astype(np.int32)
    stats = token_stats(jnp.asarray(logits), jnp.asarray(targets))
    for index in np.ndindex(2, 5):
        row = logits[index].astype(np.float64)
        assert float(stats.logp[index]) == pytest.approx(row[targets[index]] - log_sum_exp(row), rel=1e-4, abs=1e-3)
        assert float(stats.lse[index]) == pytest.approx(log_sum_exp(row), rel=1e-6)
        assert float(stats.mean_logit[index]) == pytest.approx(row.mean(), rel=1e-6)


@pytest.mark.parametrize("logits_chunk", [1, 5, 100])
def test_statistics_do_not_depend_on_the_cut(model, batch, logits_chunk):
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(*batch["tokens"].shape, 32)).astype(np.float32))
    slopes = jnp.asarray(np.random.default_rng(2).normal(size=(3, *batch["tokens"].shape)).astype(np.float32))

    def total(model, hidden, size):
        stats = whole_sequence_stats(model, hidden, jnp.asarray(batch["targets"]), size)
        return sum(jnp.sum(x * slope) for x, slope in zip(stats, slopes, strict=True))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    cut, whole = gradient(model, hidden, logits_chunk), gradient(model, hidden, 12)
    for found, expected in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_token_without_weight_has_no_influence_whatever_its_target():
    logits, targets, weights = small_case()
    targets = np.where(targets == -100, 1, targets)
    ignored = np.where(weights == 0, -5, targets)
    ignored[0, 3], weights_too = -100, weights.copy()
    weights_too[0, 3] = 0.0
    objective = CrossEntropy(label_smoothing=0.1, z_loss=0.1)
    found, slopes = value_and_gradient(objective, jnp.asarray(logits), ignored, weights)
    expected, _ = value_and_gradient(objective, jnp.asarray(logits), targets, weights_too)
    assert float(found) == float(expected)
    assert not np.any(slopes[1, 2])
    assert not np.any(slopes[0, 3])


def plain_cross_entropy(logits, batch):
    """Label smoothing 0.1 and z-loss 0.05, straight from the definitions."""
    log_probs = jax.nn.log_softmax(logits)
    targets = jnp.maximum(batch["targets"], 0)
    wanted = 0.9 * jax.nn.one_hot(targets, logits.shape[-1]) + 0.1 / logits.shape[-1]
    per_token = -jnp.sum(wanted * log_probs, axis=-1) + 0.05 * jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2
    weights = jnp.where(batch["targets"] == -100, 0.0, batch["weights"].astype(logits.dtype))
    return jnp.sum(weights * per_token) / jnp.sum(weights)


@pytest.mark.parametrize("methods", rest_slow([METHODS, TWO_METHODS], TWO_METHODS), ids=len)
def test_every_method_is_exact_and_never_has_all_logits(methods):
    def batch(vocab_size):
        made = random_batch(vocab_size, 4, 12)
        return made | {"weights": made["weights"].astype(np.float64)}

    check_objective(CrossEntropy(label_smoothing=0.1, z_loss=0.05), plain_cross_entropy, batch, methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_smoothing": 1.0},
            "CrossEntropy.label_smoothing is 1.0: it must be a number of at least 0 and below 1",
        ),
        ({"z_loss": -0.1}, "CrossEntropy.z_loss is -0.1: it must be a number of at least 0"),
    ],
)
def test_an_objective_is_checked_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(**changes)
