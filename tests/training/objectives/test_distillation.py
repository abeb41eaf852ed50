"""Distillation against the divergence over all logits in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.training import METHODS, Distillation
from streamjax.training.objectives.distillation import divergence
from tests.covering import rest_slow
from tests.training.gradient_checks import check_objective


def taught(vocab_size, top_k=5, length=12, seed=0):
    """Three rows with a drawn teacher's likeliest tokens; some tokens have no weight, and some of these no target."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (3, length + 1)).astype(np.int32)
    weights, targets = random.uniform(0.2, 2.0, (3, length)), tokens[:, 1:].copy()
    weights[0, :4] = weights[2] = 0.0
    targets[weights == 0] = -100
    logp = np.asarray(jax.nn.log_softmax(2.0 * random.standard_normal((3, length, vocab_size))))
    ids = np.argsort(-logp, axis=-1)[..., :top_k].astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "weights": weights,
        "teacher_ids": ids,
        "teacher_logp": np.take_along_axis(logp, ids, -1),
    }


@pytest.mark.parametrize("share", rest_slow([0.0, 0.25], 0.25))
@pytest.mark.parametrize("methods", rest_slow([METHODS, ("chunk",)], ("chunk",)), ids=len)
def test_loss_and_gradient_are_those_of_all_logits(share, methods):
    """For the teacher's five tokens and a sixth that stands for all others."""

    def plain(logits, batch):
        logp = jax.nn.log_softmax(logits)
        mine = jnp.exp(jnp.take_along_axis(logp, batch["teacher_ids"], -1))
        theirs = jnp.exp(batch["teacher_logp"])
        mine, theirs = (jnp.concatenate((p, 1 - p.sum(-1, keepdims=True)), -1) for p in (mine, theirs))
        loss = (theirs * jnp.log(theirs / mine)).sum(-1)
        chosen = jnp.take_along_axis(logp, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
        loss = (1 - share) * loss - share * chosen
        return jnp.sum(loss * batch["weights"]) / jnp.sum(batch["weights"])

    check_objective(Distillation(top_k=5, cross_entropy=share), plain, taught, methods)


def test_with_all_tokens_it_is_the_divergence_and_with_fewer_a_lower_bound():
    random = np.random.default_rng(1)
    p, q = (jax.nn.log_softmax(x) for x in 3.0 * random.standard_normal((2, 4, 6, 9)))
    whole = (jnp.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(divergence(p, q), whole, atol=1e-5)
    order = jnp.argsort(-p, axis=-1)
    bounds = [divergence(*(jnp.take_along_axis(x, order[..., :n], -1) for x in (p, q))) for n in (1, 3, 9)]
    assert (bounds[0] <= bounds[1] + 1e-6).all()
    assert (bounds[1] <= bounds[2] + 1e-6).all()
    np.testing.assert_allclose(divergence(p, p), 0, atol=1e-6)
    assert np.isfinite(jax.grad(lambda q: divergence(p, q).sum())(p)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("teacher_ids"), "the batch has no 'teacher_ids'"),
        (
            lambda b: b.update(teacher_logp=b["teacher_logp"][..., :2]),
            r"teacher_logp is \[3, 12, 2\], tokens \[3, 12\]",
        ),
    ],
)
def test_batches_that_make_no_sense(change, message):
    batch = taught(17)
    change(batch)
    with pytest.raises(ValueError, match=message):
        Distillation(top_k=5).check(batch, 17)
    with pytest.raises(ValueError, match=r"Distillation\.cross_entropy is 0\.5"):
        Distillation(matches="layers", cross_entropy=0.5)
