"""A batch in pieces is the batch: microbatches, chunks of streams and devices, for every objective, in float64."""

from functools import cache, partial

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import (
    DPO,
    GRPO,
    CrossEntropy,
    Objective,
    accumulate_gradients,
    loss_and_grad,
    shard_batch,
    streaming_loss_and_grad,
)
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.objectives.objective import Linear
from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, assert_same, random_model

ROWS, LENGTH = 8, 6
OBJECTIVES = {
    "mean": CrossEntropy(),
    "another ignore_index": CrossEntropy(ignore_index=0),
    "smoothed": CrossEntropy(label_smoothing=0.2, z_loss=0.1, ignore_index=-1),
    "pairs": DPO(beta=0.3),
    "pairs, means": DPO(beta=0.3, label_smoothing=0.1, length_normalised=True),
    "sequence": GRPO(kl=0.1),
    "token": GRPO(kl=0.0, normalisation="token"),
    "constant": GRPO(kl=0.1, normalisation="constant", max_tokens=9),
    "predictions": Distillation(top_k=3, cross_entropy=0.25),
}


def uneven_batch(objective):
    """Rows whose tokens count very unevenly: one not at all, and with it the pair that it is in."""
    random = np.random.default_rng(3)
    tokens = random.integers(1, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    counts = random.random((ROWS, LENGTH)) < np.array([1, 1, 0.2, 0.4, 0.9, 0, 0.3, 0.6])[:, None]
    counts[:, 2] |= np.arange(ROWS) != 5
    weights = (random.uniform(0.2, 2.0, counts.shape) * counts).astype(np.float32)
    targets = tokens[:, 1:]
    if isinstance(objective, CrossEntropy):
        targets, weights = np.where(counts, targets, objective.ignore_index), np.ones_like(weights)
    batch = {"tokens": tokens[:, :-1], "targets": targets.astype(np.int32), "weights": weights}
    if isinstance(objective, DPO):
        batch["reference_logp"] = random.normal(size=ROWS).astype(np.float32) - 20
    if isinstance(objective, Distillation):
        logp = np.sort(np.log(random.dirichlet(np.ones(CONFIG.vocab_size), counts.shape)), axis=-1)[..., :-4:-1]
        ids = [random.permutation(CONFIG.vocab_size)[: objective.top_k] for _ in range(counts.size)]
        batch["teacher_ids"] = np.array(ids, np.int32).reshape(*counts.shape, -1)
        batch["teacher_logp"] = logp.astype(np.float32)
    if isinstance(objective, GRPO):
        batch["advantages"] = random.normal(size=ROWS).astype(np.float32)
        batch |= {
            name: random.normal(size=counts.shape).astype(np.float32) - 3 for name in ("old_logp", "reference_logp")
        }
    return batch


@cache
def whole(name):
    """A model, a batch for an objective, and its loss and gradient at once."""
    with jax.enable_x64(True):
        model, batch = random_model(CONFIG), uneven_batch(OBJECTIVES[name])
        return model, batch, jax.jit(partial(loss_and_grad, objective=OBJECTIVES[name]))(model, batch)


def test_no_objective_is_left_out():
    inside = {kind for kind in Objective.__subclasses__() if kind.__module__.startswith("streamjax")}
    assert {type(objective) for objective in OBJECTIVES.values()} == inside - {Linear}


@pytest.mark.covering
@pytest.mark.parametrize(("microbatches", "options"), [(4, {}), (2, {"method": "layer", "chunk_size": 4})])
@pytest.mark.parametrize("name", rest_slow(OBJECTIVES, "another ignore_index", "pairs"))  # "mean": test_step.py
def test_microbatches_are_the_batch(name, microbatches, options):
    objective, (model, batch, expected) = OBJECTIVES[name], whole(name)
    with jax.enable_x64(True):
        step = partial(accumulate_gradients, microbatches=microbatches, objective=objective, **options)
        assert_same(jax.jit(step)(model, batch), expected)


def test_rows_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ValueError, match="8 rows cannot be dealt out to 8 microbatches, 2 of them together for DPO"):
        accumulate_gradients(random_model(CONFIG, "float32"), uneven_batch(DPO()), 8, objective=DPO())
    with pytest.raises(ValueError, match=r"8 rows cannot be dealt out to 3 microbatches$"):
        accumulate_gradients(random_model(CONFIG, "float32"), uneven_batch(CrossEntropy()), 3)


@pytest.mark.parametrize(
    "name",
    rest_slow([name for name, objective in OBJECTIVES.items() if objective.separable], "another ignore_index"),
)
def test_a_stream_in_chunks_is_the_batch(name):
    objective, (model, batch, expected) = OBJECTIVES[name], whole(name)
    with jax.enable_x64(True):
        state = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), ROWS)
        loss, grads, _ = streaming_loss_and_grad(model, state, batch, objective=objective, chunk_size=4)
        assert_same((loss, grads), expected)


@pytest.mark.parametrize(
    ("name", "method", "microbatches"),
    [
        pytest.param("pairs", "layer", 1, marks=pytest.mark.slow),
        pytest.param("pairs", "chunk", 1, marks=pytest.mark.slow),
        ("pairs", "full", 2),
        pytest.param("another ignore_index", "layer", 2, marks=pytest.mark.slow),
    ],
)
def test_devices_that_split_the_rows_are_one(name, method, microbatches):
    """Eight devices with a row each would part DPO's pairs."""
    objective, (model, batch, expected) = OBJECTIVES[name], whole(name)
    cut = {} if method == "full" else {"chunk_size": 4}
    mesh = make_mesh(data=4, fsdp=2)
    with jax.enable_x64(True):
        step = partial(accumulate_gradients, microbatches=microbatches, objective=objective, method=method, **cut)
        with jax.set_mesh(mesh):
            found = jax.jit(step)(shard_model(model, mesh), shard_batch(batch, mesh))
        assert_same(found, expected)
