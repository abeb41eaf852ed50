"""GRPO and its variants against the papers' formulas over all logits in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.training import GRPO, group_advantages
from streamjax.training.objectives.objective import token_stats
from tests.training.gradient_checks import check_objective


def answers(vocab_size, length=12, seed=0):
    """Two groups of two answers, one of them empty, behind prompts; what does not count holds what must not be used."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (4, length + 1)).astype(np.int32)
    weights, targets = np.zeros((4, length)), tokens[:, 1:].copy()
    for row, (start, stop) in enumerate([(2, 9), (2, 12), (5, 6), (0, 0)]):
        weights[row, start:stop] = 1.0
    near = np.log(1 / vocab_size)  # what a model that knows nothing gives each token
    old, reference = (near + scale * random.normal(size=(4, length)) for scale in (0.4, 0.8))
    for x, value in ((targets, -100), (old, -1e6), (reference, 1e6)):
        x[weights == 0] = value
    return {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "weights": weights,
        "advantages": np.array([1.5, -1.0, -0.5, 0.7]),
        "old_logp": old,
        "reference_logp": reference,
    }


def plain_grpo(logits, batch, low=0.2, high=0.2, kl=0.04, normalisation="sequence", max_tokens=1, on_policy=False):
    """Equation 3 of 2402.03300 answer by answer, with the ratio and the estimator of equation 4 in probabilities."""
    probabilities = jax.nn.softmax(logits)
    rows, tokens = int(logits.shape[0]), np.sum(batch["weights"])
    loss = 0.0
    for row in range(rows):
        answer = np.flatnonzero(batch["weights"][row])
        p = probabilities[row, answer, batch["targets"][row, answer]]
        old = jax.lax.stop_gradient(p) if on_policy else np.exp(batch["old_logp"][row, answer])
        ratio, advantage = p / old, batch["advantages"][row]
        clipped = jnp.where(ratio < 1 - low, 1 - low, jnp.where(ratio > 1 + high, 1 + high, ratio))
        towards = np.exp(batch["reference_logp"][row, answer]) / p
        gain = jnp.where(ratio * advantage < clipped * advantage, ratio, clipped) * advantage
        gain = gain - kl * (towards - jnp.log(towards) - 1)
        over = {"sequence": rows * max(len(answer), 1), "token": tokens, "constant": rows * max_tokens}
        loss -= jnp.sum(gain) / over[normalisation]
    return loss


def loss_of(objective, logits, batch):
    prepared = objective.prepare(batch)
    return objective.loss(token_stats(logits, prepared["targets"]), prepared)


value_and_gradient = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (GRPO(), {}),
        (GRPO(kl=0.5, clip_low=0.1, clip_high=0.4), {"kl": 0.5, "low": 0.1, "high": 0.4}),
        (GRPO(kl=0.0, clip_high=0.28, normalisation="token"), {"kl": 0.0, "high": 0.28, "normalisation": "token"}),
        (
            GRPO(kl=0.0, normalisation="constant", max_tokens=20),
            {"kl": 0.0, "normalisation": "constant", "max_tokens": 20},
        ),
        (GRPO(), {"on_policy": True}),
    ],
)
def test_value_and_gradient_against_float64(objective, options):
    plain_batch = answers(17)
    arrays = dict(plain_batch)
    if options.get("on_policy"):
        del arrays["old_logp"]
    if objective.kl == 0:
        del arrays["reference_logp"]
    objective.check(arrays, 17)
    with jax.enable_x64(True):
        logits = jnp.asarray(0.5 * np.random.default_rng(1).normal(size=(4, 12, 17)))
        batch = {name: jnp.asarray(x) for name, x in arrays.items()}
        found = value_and_gradient(objective, logits, batch)
        plain = partial(plain_grpo, batch=plain_batch, **options)
        expected = jax.jit(jax.value_and_grad(plain))(logits)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-13)
    assert np.max(np.abs(expected[1])) > 1e-3


def test_ratios_of_the_cases_above_are_clipped_on_both_sides_and_not_at_all():
    batch = answers(17)
    logits = 0.5 * np.random.default_rng(1).normal(size=(4, 12, 17))
    logp = token_stats(jnp.asarray(logits), jnp.maximum(batch["targets"], 0)).logp
    ratio = np.exp((logp - batch["old_logp"])[batch["weights"] > 0])
    assert np.any(ratio < 0.8)
    assert np.any(ratio > 1.2)
    assert np.any((ratio > 0.8) & (ratio < 1.2))


@pytest.mark.slow
def test_every_method_is_exact_and_never_has_all_logits():
    def plain(logits, batch):
        return plain_grpo(logits, answers(logits.shape[-1]))

    check_objective(GRPO(), plain, answers)


def test_on_policy_without_penalty_is_the_policy_gradient():
    batch = {name: jnp.asarray(x) for name, x in answers(17).items()}
    del batch["old_logp"], batch["reference_logp"]
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12, 17)).astype(np.float32))

    def policy_gradient(logits):
        logp = token_stats(logits, jnp.maximum(batch["targets"], 0)).logp
        return -jnp.sum(batch["weights"] * batch["advantages"][:, None] * logp) / np.sum(batch["weights"])

    found = jax.grad(loss_of, argnums=1)(GRPO(kl=0.0, normalisation="token"), logits, batch)
    np.testing.assert_allclose(found, jax.grad(policy_gradient)(logits), rtol=1e-4, atol=1e-7)


def test_how_much_a_batch_counts():
    batch = {name: jnp.asarray(x) for name, x in answers(17).items()}
    assert float(GRPO().count(batch)) == 4.0
    assert float(GRPO(normalisation="token").count(batch)) == 18.0


def test_advantages_are_rewards_against_their_group():
    rewards = np.array([1.0, 0.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    groups = rewards.reshape(2, 4)
    centred = (groups - groups.mean(1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(group_advantages(rewards, 4, scaled=False), centred, atol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 4)[:4], centred[:4] / groups[0].std(), rtol=1e-3)
    np.testing.assert_array_equal(group_advantages(rewards, 4)[4:], 0.0)  # all alike: nothing to learn
    with pytest.raises(ValueError, match="8 rewards are no whole groups of 3"):
        group_advantages(rewards, 3)
    with pytest.raises(ValueError, match="group_size is 1: an answer is compared with others"):
        group_advantages(rewards, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("advantages"), "no 'advantages'; it needs tokens, targets, weights, advantages"),
        (lambda b: b.pop("reference_logp"), "no 'reference_logp', which GRPO.kl = 0.04 needs; without it set kl=0"),
        (lambda b: b.update(advantages=np.zeros((4, 12))), r"advantages is \[4, 12\].*must be \[4\]"),
        (lambda b: b.update(old_logp=np.zeros(4)), r"old_logp is \[4\].*must be \[4, 12\]"),
        (lambda b: b["weights"].fill(0), "no token of the batch counts"),
        (lambda b: b["targets"].__setitem__((0, 4), -1), "target -1 at row 0, token 4: the vocabulary has 17 ids"),
    ],
)
def test_a_batch_that_makes_no_sense(change, message):
    batch = answers(17)
    GRPO().check(batch, 17)
    change(batch)
    with pytest.raises(ValueError, match=message) as error:
        GRPO().check(batch, 17)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.5}, "GRPO.clip_low is 1.5: it must be a number from 0 to 1"),
        ({"clip_high": -0.1}, "GRPO.clip_high is -0.1: it must be a number of at least 0"),
        ({"kl": -1.0}, "GRPO.kl is -1.0"),
        ({"normalisation": "batch"}, "GRPO.normalisation is 'batch': it must be 'sequence' or 'token' or 'constant'"),
        ({"normalisation": "constant"}, "GRPO.max_tokens is None with normalisation 'constant'"),
        ({"max_tokens": 5}, "GRPO.max_tokens is 5 with normalisation 'sequence'"),
    ],
)
def test_an_objective_is_checked_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        GRPO(**options)
