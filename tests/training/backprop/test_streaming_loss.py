"""Training on streams: the loss is what streaming costs, the gradient is exact inside a batch and ends at its start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import Decoder, UniformConfig
from streamjax.parallel.mesh import build_sharded, make_mesh, shardings
from streamjax.training import (
    OptimizerConfig,
    evaluate,
    loss_and_grad,
    make_optimizer,
    make_train_step,
    new_state,
    shard_batch,
    streaming_loss_and_grad,
)
from streamjax.training.objectives.objective import CrossEntropy
from tests.training.gradient_checks import random_model

ROWS, LENGTH = 3, 11
CACHE = sj.kv.preset("streaming_llm", sinks=2, window=7)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)


@pytest.fixture(scope="module")
def stream():
    """Tokens of three streams, enough for three batches."""
    return np.random.default_rng(1).integers(0, 61, (ROWS, 3 * LENGTH + 1)).astype(np.int32)


@pytest.fixture(scope="module")
def shallow(model):
    """A model of one layer."""
    return jax.jit(partial(Decoder, UniformConfig.from_model_config(model.config).replace(num_layers=1)))(
        jax.random.key(0)
    )


def batch_of(stream, start, length=LENGTH, weights=None):
    rows = stream[:, start : start + length + 1]
    ones = np.ones((len(rows), length), np.float32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": ones if weights is None else weights}


def assert_same(grads, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


ARCHITECTURES = {
    "global": {},
    "window": {"windows": (4,), "num_layers": 1},
    "windows": {"windows": (4, None)},
    "alibi": {"position": "alibi", "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "softcap": {"attention_softcap": 5.0, "logit_softcap": 8.0, "tie_embeddings": False},
}


@pytest.mark.parametrize(
    ("name", "scan_layers", "chunk_size", "capacity"),
    [
        pytest.param("global", False, 4, LENGTH, marks=pytest.mark.slow),
        pytest.param("global", True, 1, LENGTH, marks=pytest.mark.slow),
        ("window", False, 6, 1200),
        pytest.param("windows", False, 6, 1200, marks=pytest.mark.slow),
        pytest.param("alibi", False, 4, 1200, marks=pytest.mark.slow),
        pytest.param("softcap", True, None, LENGTH, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_a_first_batch_is_that_of_the_whole_model(
    model, stream, name, scan_layers, chunk_size, capacity
):
    """A `dense` cache keeps everything, so that cutting into chunks changes nothing; 11 is no multiple of 4 or 6."""
    config = UniformConfig.from_model_config(model.config).replace(**ARCHITECTURES[name])
    model = random_model(config, "float32", stacked=scan_layers)
    weights = np.random.default_rng(0).uniform(0.2, 2.0, (ROWS, LENGTH)).astype(np.float32)
    weights[0, 2:9] = 0.0
    batch = batch_of(stream, 0, weights=weights)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=capacity), ROWS)
    loss, grads, _ = streaming_loss_and_grad(model, state, batch, chunk_size=chunk_size, logits_chunk=3)
    expected_loss, expected = loss_and_grad(model, batch, method="full")
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_same(grads, expected)


@pytest.mark.parametrize(
    ("cache", "chunk_size"),
    [
        pytest.param(CACHE, 1, marks=pytest.mark.slow),
        pytest.param(CACHE, 4, marks=pytest.mark.slow),
        (sj.kv.preset("window", window=5), 11),
        pytest.param(sj.kv.preset("dense", capacity=40), 4, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_what_streaming_costs(shallow, stream, cache, chunk_size):
    """Batch after batch, the tokens across their borders included, and the state behind them is the stream's own."""
    model, state = shallow, sj.init_state(shallow, cache, ROWS)
    scored, nll = sj.score(model, sj.init_state(model, cache, ROWS), stream, chunk_size=17)  # 34 tokens: one program
    for start in range(0, 3 * LENGTH, LENGTH):
        loss, _, state = streaming_loss_and_grad(model, state, batch_of(stream, start), chunk_size=chunk_size)
        expected = nll[:, start + 1 : start + LENGTH + 1].mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    state, _ = sj.step(model, state, stream[:, -1:])  # the last one is a target, and was not read
    np.testing.assert_array_equal(state.seen, scored.seen)
    np.testing.assert_array_equal(state.position, scored.position)
    _, after = sj.step(model, state, stream[:, :1])
    _, expected = sj.step(model, scored, stream[:, :1])
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_with_sinks_and_a_window_chunks_do_not_change_the_gradient(model, stream):
    """Inside one chunk nothing passes through the cache; cut into tokens, all of it does."""
    state = sj.init_state(model, CACHE, ROWS)
    _, _, state = streaming_loss_and_grad(model, state, batch_of(stream, 0))
    batch = batch_of(stream, LENGTH, 2 * LENGTH)
    _, expected, _ = streaming_loss_and_grad(model, state, batch, chunk_size=2 * LENGTH)
    _, grads, _ = streaming_loss_and_grad(model, state, batch, chunk_size=1)
    assert_same(grads, expected)


def test_the_gradient_ends_where_the_batch_begins(shallow, stream):
    """Against differences of what the second batch costs with the first one's cache held fixed.

    All batches have the length of two, one half of them without weight: one program reads them all.
    """
    model, dense = shallow, sj.kv.preset("dense", capacity=64)
    state = sj.read(model, sj.init_state(model, dense, ROWS), batch_of(stream, 0)["tokens"])
    weights = np.ones((ROWS, 2 * LENGTH), np.float32)
    weights[:, LENGTH:] = 0.0
    second = batch_of(stream, LENGTH, 2 * LENGTH, weights)
    loss, grads, _ = streaming_loss_and_grad(model, state, second, chunk_size=LENGTH)
    # The same loss when both batches are one: now the gradient reaches the first half.
    both = batch_of(stream, 0, 2 * LENGTH, 1 - weights)
    empty = sj.init_state(model, dense, ROWS)
    same_loss, through, _ = streaming_loss_and_grad(model, empty, both, chunk_size=LENGTH)
    assert float(same_loss) == pytest.approx(float(loss), rel=1e-5)
    direction = jax.tree.map(jnp.subtract, through, grads)
    norm = sum(float(jnp.vdot(d, d)) for d in jax.tree.leaves(direction)) ** 0.5
    assert norm > 1e-3
    direction = jax.tree.map(lambda d: d / norm, direction)

    def cost(step):
        moved = jax.tree.map(lambda p, d: p + step * d, model, direction)
        return float(streaming_loss_and_grad(moved, state, second, chunk_size=LENGTH)[0])

    slope = (cost(0.02) - cost(-0.02)) / 0.04

    def along(grads):
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
        return sum(float(jnp.vdot(g, d)) for g, d in pairs)

    assert slope == pytest.approx(along(grads), abs=0.1 * norm)
    assert abs(slope - along(through)) > 0.8 * norm


def test_between_chunks_only_states_are_kept(model):
    """Twice the batch costs the states of the chunks that are more, and its tokens."""
    config = UniformConfig.from_model_config(model.config).replace(num_layers=1, mlp_dim=512)
    deep = random_model(config, "float32")
    state = sj.init_state(deep, sj.kv.preset("window", window=16), 1)

    def temporary(length):
        batch = {name: np.zeros((1, length), np.int32) for name in ("tokens", "targets")}
        batch["weights"] = np.ones((1, length), np.float32)
        lowered = jax.jit(partial(streaming_loss_and_grad, chunk_size=64)).lower(deep, state, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    more = temporary(4096) - temporary(2048)
    assert more < 32 * state.cache_bytes * 1.5 + 2048 * 64


@pytest.mark.slow
def test_eight_devices_read_the_streams_of_one(model):
    config = model.config.replace(vocab_size=64)
    stream = np.random.default_rng(2).integers(0, 64, (8, 3 * LENGTH + 1)).astype(np.int32)

    def build(key):
        model = Decoder(config, key)
        return new_state(model, OPTIMIZER, sj.init_state(model, CACHE, 8))

    step = make_train_step(OPTIMIZER, chunk_size=4)
    single = build_sharded(build, None, jax.random.key(1))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = jax.device_put(jax.tree.map(jnp.copy, single), shardings(single, mesh))
    for start in range(0, 3 * LENGTH, LENGTH):
        batch = batch_of(stream, start)
        single, expected = step(single, batch)
        with jax.set_mesh(mesh):
            state, metrics = step(state, shard_batch(batch, mesh))
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert len(state.stream.layers[0][0].k.sharding.device_set) == 8


@pytest.mark.slow
def test_evaluation_reads_streams(model, stream):
    weights = np.ones((ROWS, LENGTH), np.float32)
    weights[2, 5:] = 0.0
    batches = [batch_of(stream, 0), batch_of(stream, LENGTH, weights=weights)]
    _, nll = sj.score(model, sj.init_state(model, CACHE, ROWS), stream)
    kept = np.concatenate([batch["weights"] for batch in batches], axis=1)
    expected = float((nll[:, 1 : 2 * LENGTH + 1] * kept).sum() / kept.sum())
    found = evaluate(model, batches, stream=sj.init_state(model, CACHE, ROWS), chunk_size=4)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_only_adapters_are_trained(model, stream):
    """With the other objective too that a stream can have: the gradient of the whole model's adapters."""
    adapted = sj.add_lora(model, 2, 4.0, ("q", "v"), jax.random.key(3))
    options = {"objective": CrossEntropy(label_smoothing=0.1, z_loss=1e-2), "trainable": sj.LoRAParam}
    state = sj.init_state(adapted, sj.kv.preset("dense", capacity=LENGTH), ROWS)
    loss, grads, _ = streaming_loss_and_grad(adapted, state, batch_of(stream, 0), chunk_size=4, **options)
    expected_loss, expected = loss_and_grad(adapted, batch_of(stream, 0), **options)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert grads.embedding is None
    assert_same(grads, expected)


def test_what_does_not_fit_is_said_in_one_line(model, stream, batch):
    state = sj.init_state(model, CACHE, ROWS)
    good = batch_of(stream, 0)
    for wrong, message in (
        ({name: good[name] for name in ("tokens", "weights")}, "the batch has no 'targets'; it needs"),
        ({**good, "segment_ids": good["tokens"]}, "the batch has segments, which a stream has not"),
        (batch, "8 rows"),
        ({**good, "weights": np.zeros((ROWS, LENGTH), np.float32)}, "no token of the batch counts"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            streaming_loss_and_grad(model, state, wrong)
        assert "\n" not in str(error.value)
    step = make_train_step(OPTIMIZER, accumulation=3)
    with pytest.raises(ValueError, match="accumulation is 3: streams are read in one piece, set it to 1"):
        step(new_state(model, OPTIMIZER, state), good)
