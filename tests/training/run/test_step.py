"""The training step: accumulation equals the big batch, and eight devices equal one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.models import Decoder, UniformConfig
from streamjax.parallel.mesh import build_sharded, make_mesh, shardings
from streamjax.training import (
    BackpropConfig,
    OptimizerConfig,
    accumulate_gradients,
    eval_step,
    loss_and_grad,
    make_optimizer,
    make_train_step,
    new_state,
    shard_batch,
)

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
STEP = make_train_step(OPTIMIZER)


def build(config, scan_layers=False):
    def state(key):
        return new_state(Decoder(config, key, scan_layers=scan_layers), OPTIMIZER)

    return state


@pytest.mark.usual("remat-4")
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("options", [{}, BackpropConfig(method="remat", chunk_size=5).options()], ids=["full", "remat"])
def test_microbatches_add_up_to_the_batch(model, batch, microbatches, options):
    """Whatever the method; one of the four microbatches has no weight at all."""
    batch = {**batch, "weights": batch["weights"] * (np.arange(8) % 4 != 1)[:, None].astype(np.float32)}
    loss, grads = jax.jit(partial(accumulate_gradients, microbatches=microbatches, **options))(model, batch)
    expected_loss, expected = loss_and_grad(model, batch)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_step_follows_the_gradient_and_takes_the_state_over(model, batch):
    state = build_sharded(build(model.config), None, jax.random.key(0))
    before = jax.tree.leaves(state)
    losses = []
    for _ in range(10):
        state, metrics = STEP(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 10
    assert all(leaf.is_deleted() for leaf in before)
    total, weight = eval_step(state.model, batch)
    assert float(weight) == pytest.approx(batch["weights"].sum(), rel=1e-6)
    assert float(total / weight) == pytest.approx(float(loss_and_grad(state.model, batch)[0]), rel=1e-6)


def test_bfloat16_activations_leave_the_master_weights_float32(model, batch):
    def state(key):
        decoder = Decoder(model.config, key, dtype=jnp.dtype(jnp.bfloat16), param_dtype=jnp.dtype(jnp.float32))
        return new_state(decoder, OPTIMIZER)

    half, whole = jax.jit(state)(jax.random.key(0)), jax.jit(build(model.config))(jax.random.key(0))
    lowered = STEP.lower(half, batch)
    assert "bf16" in lowered.as_text()
    half, metrics = lowered.compile()(half, batch)
    _, expected = STEP(whole, batch)
    assert float(metrics["loss"]) != float(expected["loss"])
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves((half.model, half.opt_state))} <= {np.dtype("f4"), np.dtype("i4")}


@pytest.mark.parametrize(
    ("axes", "scan_layers", "accumulation"),
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, False, 1, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 4}, True, 2),
    ],
)
def test_eight_devices_do_what_one_does(batch, model, axes, scan_layers, accumulation):
    config = model.config.replace(vocab_size=64)
    batch = {name: np.concatenate([x, np.roll(x, 3, axis=1)]) for name, x in batch.items()}
    step = make_train_step(OPTIMIZER, accumulation=accumulation)
    single = build_sharded(build(config, scan_layers), None, jax.random.key(1))
    mesh = make_mesh(**axes)
    state = jax.device_put(jax.tree.map(jnp.copy, single), shardings(single, mesh))
    for _ in range(3):
        single, expected = step(single, batch)
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = step(state, shard_batch(batch, mesh))
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(single.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_parameters_and_moments_are_split(model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    make = build(UniformConfig.from_model_config(model.config).replace(vocab_size=64, num_layers=1))
    state = build_sharded(make, mesh, jax.random.key(1))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(jax.jit(make)(jax.random.key(1))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

    def shards(array):
        return {shard.data.shape for shard in array.addressable_shards}

    for tree in (state.model, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        assert shards(tree.embedding[...]) == {(32, 16)}  # [vocab / tensor, embed / fsdp]
        assert shards(tree.layers[0].mixer.projections.qkv[...]) == {(16, 1, 4, 8)}  # [embed / fsdp, kv / tensor, ...]
        assert shards(tree.layers[0].mlp.up[...]) == {(16, 2, 24)}
        assert shards(tree.layers[0].mlp.down[...]) == {(24, 16)}
        assert shards(tree.norm.weight[...]) == {(32,)}
    rows = shard_batch({"tokens": np.zeros((8, 12), np.int32)}, mesh)["tokens"]
    assert shards(rows) == {(2, 12)}


def test_the_state_is_never_whole_on_one_device(model):
    mesh = make_mesh(fsdp=8)
    config = UniformConfig.from_model_config(model.config).replace(vocab_size=4096, num_layers=1)
    make = build(config)
    placement = shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(make, out_shardings=placement).lower(jax.random.key(0)).compile()
    table = 4096 * 32 * 4
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 3 * table / 8 * 1.5  # weights and two moments, an eighth each
    assert memory.temp_size_in_bytes < table


def test_the_second_step_is_not_compiled_again(model, batch):
    """A model whose arrays are committed to a device, as one that was loaded may be."""
    state = new_state(jax.device_put(jax.tree.map(jnp.copy, model), jax.devices()[0]), OPTIMIZER, skipping=True)
    assert all(leaf.committed for leaf in jax.tree.leaves(state))
    step = make_train_step(OPTIMIZER)
    for _ in range(2):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
