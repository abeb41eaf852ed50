"""Streaming DiLoCo against a plain loop of the paper's algorithm, on one device and on meshes."""

import dataclasses
import re
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models import Decoder, UniformConfig, stack_layers
from streamjax.parallel.mesh import build_sharded, make_mesh, shard_model
from streamjax.training import DiLoCoConfig, OptimizerConfig, make_optimizer, new_state, shard_batch
from streamjax.training.diloco.fragments import fragments_of
from streamjax.training.diloco.messages import Message, decode, encode
from streamjax.training.diloco.replicas import one_model, replicate
from streamjax.training.diloco.steps import Replicas
from streamjax.training.run.step import step_function
from tests.oracles import diloco as oracle
from tests.training.gradient_checks import random_model

CONFIG = UniformConfig(
    vocab_size=29, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, tie_embeddings=True
)
DILOCO = DiLoCoConfig(replicas=4, sync_interval=3, fragments=2, overlap=2, mixing=0.25, outer_learning_rate=0.7)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2), 20)
STEPS, ROWS, LENGTH = 8, 8, 8


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": rng.uniform(0.5, 1, (ROWS, LENGTH))}


training_step = step_function(OPTIMIZER)


def small_step(state, batch):
    """Instead of a step of training, whose program is large: parameters go where the numbers in the rows say."""
    aim = jnp.sum(batch["weights"] * batch["tokens"]) / jnp.sum(batch["weights"]) / CONFIG.vocab_size

    def loss(model):
        return sum(jnp.mean((leaf - place * aim) ** 2) for place, leaf in enumerate(jax.tree.leaves(model)))

    value, grads = jax.value_and_grad(loss)(state.model)
    updates, moments = OPTIMIZER.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    return dataclasses.replace(state, model=model, opt_state=moments, step=state.step + 1), {"loss": value}


def trained(mesh=None, scan_layers=False, config=DILOCO, step=training_step):
    model = random_model(CONFIG)
    model = stack_layers(model) if scan_layers else model
    model = model if mesh is None else shard_model(model, mesh)
    state = build_sharded(lambda model: new_state(model, OPTIMIZER), mesh, model)
    state = replicate(state, config, nnx.Param, mesh)
    replicas = Replicas(config, step, state, nnx.Param, mesh)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh):
        for number, batch in enumerate(batches()):
            state, metrics = replicas(state, shard_batch(batch, mesh), number)
    return state, metrics, replicas


@cache
def by_loops(step):
    """What the plain loop makes of replicas that are ordinary runs, and the mean of their last losses."""
    with jax.enable_x64(True):
        start, step, losses = random_model(CONFIG), jax.jit(step), {}
        states = [new_state(jax.tree.map(jnp.copy, start), OPTIMIZER) for _ in range(DILOCO.replicas)]
        given, share = list(batches()), ROWS // DILOCO.replicas

        def inner(number, done, params):
            state = states[number]
            leaves = [jnp.asarray(params[name]) for name in named_arrays(state.model)]
            model = jax.tree.unflatten(jax.tree.structure(state.model), leaves)
            rows = {name: x[number * share : (number + 1) * share] for name, x in given[done].items()}
            states[number], metrics = step(type(state)(model, state.opt_state, state.step), rows)
            losses[number] = float(metrics["loss"])
            return {name: np.asarray(x) for name, x in named_arrays(states[number].model).items()}

        names = named_arrays(start)
        fragments = [[], []]
        for name in names:  # layer 0; layer 1 and the ends
            fragments[0 if name.startswith("layers.0.") else 1].append(name)
        axes = {name: x.ndim for name, x in names.items()}
        found = oracle.train(
            {name: np.asarray(x) for name, x in names.items()},
            inner,
            fragments,
            {name: int(ndim > 1) for name, ndim in axes.items()},
            DILOCO,
            STEPS,
        )
        return *found, np.mean(list(losses.values()))


def check(state, metrics, expected):
    replicas, agreed, loss = expected
    for name, x in named_arrays(state.model).items():
        np.testing.assert_allclose(x, np.stack([params[name] for params in replicas]), atol=1e-10)
    found = {name: x for held in state.outer for name, x in held.params.items()}
    assert found.keys() == agreed.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, agreed[name], atol=1e-10)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("axes", "step"),
    [
        ({"replica": 2, "data": 4}, small_step),  # two replicas on the same devices
        pytest.param({"replica": 2, "data": 4}, training_step, marks=pytest.mark.slow),
        pytest.param({"replica": 4, "fsdp": 2}, training_step, marks=pytest.mark.slow),
        pytest.param({"replica": 2, "context": 2, "tensor": 2}, training_step, marks=pytest.mark.slow),
        pytest.param(None, training_step, marks=pytest.mark.slow),
    ],
)
def test_replicas_do_what_the_algorithm_says(axes, step):
    expected = by_loops(step)
    with jax.enable_x64(True):
        state, metrics, replicas = trained(None if axes is None else make_mesh(**axes), step=step)
        check(state, metrics, expected)
        model = one_model(state)
        for name, x in named_arrays(model).items():
            np.testing.assert_allclose(x, np.mean([params[name] for params in expected[0]], axis=0), atol=1e-10)
    sent = [held.sent for held in state.outer]
    sizes = [sum(x.nbytes for x in jax.tree.leaves(found)) // DILOCO.replicas for found in sent]
    assert replicas.sent_bytes(STEPS) == 2 * sizes[0] + 3 * sizes[1]  # behind 3 and 6, behind 1, 4 and 7
    numbers = sum(x.size for held in state.outer for x in held.params.values())
    assert numbers / 2 < sum(sizes) < 0.6 * numbers


def test_stacked_layers_have_the_same_fragments():
    config = CONFIG.replace(num_layers=3)
    model, separate = (
        jax.eval_shape(partial(Decoder, config, scan_layers=stacked), jax.random.key(0)) for stacked in (True, False)
    )
    found = fragments_of(model, 2, nnx.Param)
    assert {piece.rows for piece in found[0]} == {(0, 2)}
    assert {piece.rows for piece in found[1]} == {(1,), None}
    apart = fragments_of(separate, 2, nnx.Param)
    assert [sum(len(piece.rows or (0,)) for piece in pieces) for pieces in found] == [len(pieces) for pieces in apart]
    with pytest.raises(ValueError, match=r"^diloco\.fragments is 4, and the model has 3 layers: use at most 3$"):
        fragments_of(model, 4, nnx.Param)


@pytest.mark.slow
def test_stacked_layers_train_as_others_do():
    expected = by_loops(training_step)
    with jax.enable_x64(True):
        state, metrics, _ = trained(scan_layers=True)
        assert float(metrics["loss"]) == pytest.approx(expected[2], rel=1e-6)
        stacked = named_arrays(state.model)["stack.0.mlp.down"]
        for layer in range(2):
            right = np.stack([params[f"layers.{layer}.mlp.down"] for params in expected[0]])
            np.testing.assert_allclose(stacked[:, layer], right, atol=1e-10)


@jax.jit
def sent_and_read(x):
    message = encode(x, "e3m0", 1)
    return message, decode(message, 5, jnp.float32)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=10, max_size=10))
def test_a_number_arrives_as_the_nearest_of_four_bits(values):
    x = np.asarray(values, np.float32).reshape(2, 5)
    message, found = sent_and_read(x)
    assert (message.codes.dtype, message.codes.shape) == (np.uint8, (2, 3))
    # of two that are equally near either may come
    np.testing.assert_allclose(np.abs(x - found), np.abs(x - oracle.e3m0(x, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exchange", ["float32", "bfloat16"])
def test_numbers_may_be_sent_as_they_are(exchange):
    x = jnp.asarray([[1.0, -2.5], [0.0, 3.0]])
    message = encode(x, exchange, 1)
    assert isinstance(message, Message)
    assert message.codes.dtype == exchange
    np.testing.assert_array_equal(decode(message, 2, jnp.float32), x)


def test_what_crosses_between_replicas_are_the_messages():
    """A step gathers codes and scales of one fragment over the axis, and nothing else crosses it but metrics."""
    mesh = make_mesh(replica=2, devices=jax.devices()[:2])
    config = DiLoCoConfig(replicas=2, sync_interval=4, fragments=2)
    with jax.set_mesh(mesh):
        model = shard_model(random_model(CONFIG, "float32"), mesh)
        state = replicate(build_sharded(lambda m: new_state(m, OPTIMIZER), mesh, model), config, nnx.Param, mesh)
        replicas = Replicas(config, training_step, state, nnx.Param, mesh)
        batch = shard_batch({name: np.asarray(x, x.dtype if x.dtype == np.int32 else np.float32)
                             for name, x in next(batches()).items()}, mesh)  # fmt: skip
        held, sent = dataclasses.replace(state, outer=None), state.outer[0].sent
        text = replicas._inner.lower(held, batch, sent).compile().as_text()
        plain = replicas._inner.lower(held, batch, None).compile().as_text()
    assert not re.findall(r" all-gather| all-to-all| collective-permute", plain)
    assert crossing(text) - crossing(plain) == sum(x.nbytes for x in jax.tree.leaves(sent))
    assert crossing(plain) <= 64  # metrics


def crossing(text):
    """Bytes of the results of a program's collectives."""
    total = 0
    for line in text.splitlines():
        found = re.match(r"\s*%?\S+ = (.*?) (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", line)
        for kind, size in re.findall(r"(u8|u16|f32|s32)\[([\d,]*)\]", found[1]) if found else []:
            width = {"u8": 1, "u16": 2, "f32": 4, "s32": 4}[kind]
            total += width * int(np.prod([int(n) for n in size.split(",") if n]))
    return total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fragments": 4, "sync_interval": 3}, r"^diloco\.fragments 4 is more than diloco\.sync_interval 3: "),
        ({"overlap": 30}, r"^diloco\.overlap 30 is not below diloco\.sync_interval 30: "),
    ],
)
def test_turns_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        DiLoCoConfig(replicas=2, **options)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8), st.integers(0, 40))
def test_a_fragment_has_its_turn_once_in_an_interval(interval, fragments, overlap, steps):
    if fragments > interval or overlap >= interval:
        return
    config = DiLoCoConfig(replicas=2, sync_interval=interval, fragments=fragments, overlap=overlap)
    turns = [config.sent(step) for step in range(1, steps + 1)]
    for number in range(fragments):
        assert turns.count(number) == config.times_sent(number, steps)
        places = [step for step, found in enumerate(turns) if found == number]
        assert {b - a for a, b in pairwise(places)} <= {interval}
    assert [config.received(step + overlap) for step in range(1, steps + 1)] == turns
