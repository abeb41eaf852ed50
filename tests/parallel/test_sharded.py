"""A sharded run gives the numbers of an unsharded one, and its arrays are really split while it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel.mesh import build_sharded, make_mesh, shard_model, shardings
from streamjax.training.run.optimizer import OptimizerConfig, make_optimizer
from streamjax.training.run.state import new_state, shard_batch
from streamjax.training.run.step import make_train_step
from tests.covering import rest_slow
from tests.parallel.small_models import BATCH, CACHES, CONFIG, MESHES, one_layer, small_model


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize(("axes", "scan"), [(axes, i % 2 == 0) for i, axes in enumerate(MESHES.values())], ids=MESHES)
def test_forward(axes, scan):
    model, tokens = small_model(scan_layers=scan), _tokens(BATCH, 16)
    expected = sj.forward(model, tokens)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        got = sj.forward(shard_model(model, mesh), tokens)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    shape = (BATCH // rows, 16 // axes.get("context", 1), 80 // axes.get("tensor", 1))
    assert got.sharding.shard_shape(got.shape) == shape


# Chunk widths and how many tokens of each row are real: prefill, ragged ends, idle rows, single steps, a wrap.
CHUNKS = [
    (8, [7, 3, 0, 5, 8, 1, 2, 6]),
    (1, [1, 1, 1, 0, 1, 1, 0, 1]),
    (1, [1] * 8),
    (8, [8, 7, 8, 0, 1, 8, 2, 4]),
    (1, [1, 0, 1, 1, 1, 0, 1, 1]),
]


def _stream(model, cache):
    """Logits of the real tokens of every chunk, and the last state."""
    state = sj.init_state(model, CACHES[cache], BATCH)
    logits = []
    for i, (width, count) in enumerate(CHUNKS):
        state, out = sj.step(model, state, _tokens(BATCH, width, seed=i), np.array(count, np.int32))
        logits.append(np.asarray(out)[np.arange(width) < np.array(count)[:, None]])
    return np.concatenate(logits), state


@functools.cache
def _unsharded(cache, model):
    return _stream(model(), cache)


@pytest.mark.parametrize("model", rest_slow([one_layer, small_model], one_layer))
@pytest.mark.parametrize(
    ("mesh", "cache"),
    [
        ("data2-fsdp2-tensor2", "streaming_llm"),
        pytest.param("data2-tensor4", "dense", marks=pytest.mark.slow),
        pytest.param("fsdp8", "window", marks=pytest.mark.slow),
        ("context2-tensor4", "streaming_llm"),
        ("context2-tensor4", "dense"),
        pytest.param("data2-fsdp2-tensor2", "pages", marks=pytest.mark.slow),
        pytest.param("context2-tensor4", "window", marks=pytest.mark.slow),
        pytest.param("context2-tensor4", "cascade", marks=pytest.mark.slow),
        pytest.param("context2-tensor4", "pages", marks=pytest.mark.slow),
        pytest.param("data2-fsdp2-tensor2", "content", marks=pytest.mark.slow),
        pytest.param("data2-fsdp2-tensor2", "scored", marks=pytest.mark.slow),
        pytest.param("data2-fsdp2-tensor2", "clusters", marks=pytest.mark.slow),
    ],
)
def test_step(mesh, cache, model):
    expected, last = _unsharded(cache, model)
    mesh = make_mesh(**MESHES[mesh])
    with jax.set_mesh(mesh):
        got, state = _stream(shard_model(model(), mesh), cache)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(state.position, last.position)
    np.testing.assert_allclose(state.hidden, last.hidden, atol=2e-5)
    placed = jax.tree.leaves(shardings(state, mesh))
    for array, sharding in zip(jax.tree.leaves(state), placed, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    k = jax.tree.leaves(state.layers[-1][-1])[0]
    assert k.sharding.shard_shape(k.shape) != k.shape


def test_generate_and_score():
    model, prompt = one_layer(), _tokens(BATCH, 16)
    lengths = np.array([16, 4, 9, 1, 15, 16, 8, 13])

    def run(model):
        cache = CACHES["streaming_llm"]
        state, nll = sj.score(model, sj.init_state(model, cache, BATCH), prompt, 8, lengths=lengths)
        greedy = sj.Sampler(temperature=0)
        _, tokens = sj.generate(model, state, prompt[:, :8], max_new_tokens=4, sampler=greedy, chunk_size=8)
        return np.asarray(nll), np.asarray(tokens)

    expected = run(model)
    mesh = make_mesh(**MESHES["data2-fsdp2-tensor2"])
    with jax.set_mesh(mesh):
        got = run(shard_model(model, mesh))
    np.testing.assert_allclose(got[0], expected[0], atol=2e-5)
    np.testing.assert_array_equal(got[1], expected[1])


# eps is far above rounding noise: Adam would blow the noise of a zero gradient up to a whole step
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3), steps=10)


def _train(mesh):
    """Three steps on the same batches, each in two microbatches: the last state, and the losses."""

    def build(key):
        return new_state(sj.Decoder(CONFIG, key, scan_layers=True), OPTIMIZER)

    state = build_sharded(build, mesh, jax.random.key(0))
    step = make_train_step(OPTIMIZER, accumulation=2)
    losses = []
    for i in range(3):
        tokens = _tokens(2 * BATCH, 13, seed=i)
        weights = (np.random.default_rng(i).random((2 * BATCH, 12)) > 0.3).astype(np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        state, metrics = step(state, shard_batch(batch, mesh))
        losses.append(metrics["loss"])
    return state, np.array(losses)


@functools.cache
def _trained_unsharded():
    return _train(None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data2-fsdp2-tensor2", pytest.param("data2-tensor4", marks=pytest.mark.slow)])
def test_train_step(mesh):
    expected, expected_losses = _trained_unsharded()
    mesh = make_mesh(**MESHES[mesh])
    with jax.set_mesh(mesh):
        state, losses = _train(mesh)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    for got, want, start in zip(*map(jax.tree.leaves, (state.model, expected.model, small_model(True))), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
        assert np.abs(want - start).max() > 1e-3  # every parameter learnt
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    placed = jax.tree.leaves(shardings(state, mesh))
    for array, sharding in zip(jax.tree.leaves(state), placed, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert on_one < 1.3 / split * sum(x.nbytes for x in jax.tree.leaves(state))


def test_gradients_are_split_as_their_parameters():
    mesh = make_mesh(**MESHES["data2-fsdp2-tensor2"])
    tokens = _tokens(BATCH, 13)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((BATCH, 12), np.float32)}
    loss, expected = sj.training.loss_and_grad(one_layer(), jax.tree.map(jnp.asarray, batch))
    with jax.set_mesh(mesh):
        sharded, grads = sj.training.loss_and_grad(shard_model(one_layer(), mesh), shard_batch(batch, mesh))
    np.testing.assert_allclose(sharded, loss, atol=1e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
