"""DPO against the paper's formula over all logits in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.training import DPO, METHODS
from streamjax.training.objectives.objective import token_stats
from tests.covering import rest_slow
from tests.training.gradient_checks import TWO_METHODS, check_objective


def preferences(vocab_size, length=12, seed=0):
    """Three pairs, one of them padding; answers of uneven length behind prompts of uneven length."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (6, length + 1)).astype(np.int32)
    weights, targets = np.zeros((6, length)), tokens[:, 1:].copy()
    for row, (start, stop) in enumerate([(2, 9), (2, 12), (5, 6), (5, 11), (0, 0), (0, 0)]):
        weights[row, start:stop] = 1.0
    weights[3, 7] = 0.5
    targets[weights == 0] = -100
    return {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "weights": weights,
        "reference_logp": random.normal(size=6) * 3 - 20,
    }


def plain_dpo(logits, batch, beta=0.3, smoothing=0.0, mean=False):
    """Equation 7 of 2305.18290 pair by pair, with the probability that a pair's labels are swapped."""
    log_probs = jax.nn.log_softmax(logits)
    losses = []
    for chosen in range(0, logits.shape[0], 2):
        if not np.any(batch["weights"][chosen]):
            continue
        gains = []
        for row in (chosen, chosen + 1):
            answer = np.flatnonzero(batch["weights"][row])
            policy = log_probs[row, answer, batch["targets"][row, answer]] @ batch["weights"][row, answer]
            length = np.sum(batch["weights"][row]) if mean else 1.0
            gains.append((policy - batch["reference_logp"][row]) / length)
        margin = beta * (gains[0] - gains[1])
        losses.append((1 - smoothing) * jnp.log1p(jnp.exp(-margin)) + smoothing * jnp.log1p(jnp.exp(margin)))
    return sum(losses) / len(losses)


def loss_of(objective, logits, batch):
    prepared = objective.prepare(batch)
    return objective.loss(token_stats(logits, prepared["targets"]), prepared)


value_and_gradient = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (DPO(beta=0.3), {}),
        (DPO(beta=0.05, label_smoothing=0.2), {"beta": 0.05, "smoothing": 0.2}),
        (DPO(beta=2.0, length_normalised=True), {"beta": 2.0, "mean": True}),
    ],
)
def test_value_and_gradient_against_float64(objective, options):
    with jax.enable_x64(True):
        batch = {name: jnp.asarray(x) for name, x in preferences(17).items()}
        logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, 12, 17)))
        found = value_and_gradient(objective, logits, batch)
        plain = partial(plain_dpo, batch=preferences(17), **options)
        expected = jax.jit(jax.value_and_grad(plain))(logits)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-13)
    assert np.max(np.abs(expected[1])) > 1e-3


@pytest.mark.parametrize("methods", rest_slow([METHODS, TWO_METHODS], TWO_METHODS), ids=len)
def test_every_method_is_exact_and_never_has_all_logits(methods):
    def plain(logits, batch):
        return plain_dpo(logits, preferences(logits.shape[-1]), smoothing=0.1)

    check_objective(DPO(beta=0.3, label_smoothing=0.1), plain, preferences, methods)


def test_the_reference_itself_gains_nothing():
    """Where the model is the reference no pair is preferred: the loss is log 2, however long the answers are."""
    batch = {name: jnp.asarray(x) for name, x in preferences(17).items()}
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, 12, 17)).astype(np.float32))
    logp = token_stats(logits, jnp.maximum(batch["targets"], 0)).logp
    batch["reference_logp"] = jnp.sum(batch["weights"] * logp, axis=1)
    for objective in (DPO(), DPO(length_normalised=True), DPO(label_smoothing=0.4)):
        assert float(loss_of(objective, logits, batch)) == pytest.approx(np.log(2), abs=1e-6)


def test_pairs_that_count():
    batch = preferences(17)
    assert float(DPO().count({"weights": jnp.asarray(batch["weights"])})) == 2.0
    batch["weights"][1] = 0.0  # a chosen answer without its rejected one
    assert float(DPO().count({"weights": jnp.asarray(batch["weights"])})) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("reference_logp"), "no 'reference_logp'; it needs tokens, targets, weights, reference_logp"),
        (lambda b: b.update({k: x[:5] for k, x in b.items()}), "5 rows; DPO needs a multiple of 2"),
        (lambda b: b.update(reference_logp=np.zeros((6, 12))), r"reference_logp is \[6, 12\].*must be \[6\]"),
        (lambda b: b["weights"].fill(0), "no token of the batch counts"),
        (lambda b: b["weights"][::2].fill(0), "no pair of the batch counts"),
        (lambda b: b["targets"].__setitem__((0, 4), 17), "target 17 at row 0, token 4: the vocabulary has 17 ids"),
    ],
)
def test_a_batch_that_makes_no_sense(change, message):
    batch = preferences(17)
    DPO().check(batch, 17)
    change(batch)
    with pytest.raises(ValueError, match=message) as error:
        DPO().check(batch, 17)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("label_smoothing", 0.5), ("label_smoothing", -0.1)])
def test_an_objective_is_checked_when_it_is_made(name, value):
    with pytest.raises(ValueError, match=rf"DPO\.{name} is {value}"):
        DPO(**{name: value})
