"""AdamW, its schedule, clipping and decay mask, against the formulas written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from streamjax.models import Decoder, UniformConfig, stack_layers
from streamjax.training import OptimizerConfig, learning_rate_schedule, make_optimizer
from streamjax.training.run.optimizer import decay_mask


def test_schedule_warms_up_linearly_and_falls_along_a_cosine_to_its_floor():
    config = OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=10)
    rate = learning_rate_schedule(config, 110)
    expected = {0: 0.0, 5: 1e-3, 10: 2e-3, 110: 2e-4, 500: 2e-4}
    expected[60] = 2e-4 + 0.5 * (2e-3 - 2e-4)
    expected[35] = 2e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * (2e-3 - 2e-4)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-12)
    assert float(learning_rate_schedule(OptimizerConfig(warmup_steps=0), 10)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("stacked", [False, True])
def test_weight_decay_spares_norms_biases_and_vectors(stacked):
    config = UniformConfig(
        vocab_size=11, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, norm="layer",
        norm_bias=True, qk_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, logit_bias=True,
    )  # fmt: skip
    model = Decoder(config, jax.random.key(0))
    model = stack_layers(model) if stacked else model
    flat, _ = jax.tree_util.tree_flatten_with_path(decay_mask(model))
    decayed = {jax.tree_util.keystr(path).split(".")[-2] for path, value in flat if value}
    spared = {jax.tree_util.keystr(path).split(".")[-2] for path, value in flat if not value}
    assert decayed == {"embedding", "head", "qkv", "out", "up", "down"}
    assert spared == {"weight", "bias", "head_bias", "qkv_bias", "out_bias", "up_bias", "down_bias"}


def test_three_steps_against_the_formulas(model):
    config = OptimizerConfig(
        learning_rate=1e-2,
        warmup_steps=0,
        final_fraction=1.0,
        weight_decay=0.3,
        b1=0.8,
        b2=0.9,
        eps=1e-6,
        clip_norm=0.5,
    )
    optimizer = make_optimizer(config, 10)
    state, params = optimizer.init(model), model

    @jax.jit
    def change(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kernel, norm = np.float64(model.layers[0].mlp.up[...]), np.float64(model.layers[1].mlp_norm.weight[...])
    moments = {name: (np.zeros(x.shape), np.zeros(x.shape)) for name, x in (("kernel", kernel), ("norm", norm))}
    for step in range(1, 4):
        draw = np.random.default_rng(step)
        size = 1e-3 if step == 2 else 1.0  # clipped, not clipped, clipped
        grads = jax.tree.map(lambda x, d=draw, s=size: jnp.asarray(s * d.standard_normal(x.shape), jnp.float32), params)
        total = math.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(grads)))
        factor = min(1.0, 0.5 / total)
        assert (factor < 1) == (step != 2)
        values = {"kernel": kernel, "norm": norm}
        found = {"kernel": grads.layers[0].mlp.up[...], "norm": grads.layers[1].mlp_norm.weight[...]}
        for name, gradient in found.items():
            gradient = np.float64(gradient) * factor
            first, second = moments[name]
            first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
            moments[name] = first, second
            update = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-6)
            values[name] = values[name] - 1e-2 * (update + (0.3 * values[name] if name == "kernel" else 0.0))
        kernel, norm = values["kernel"], values["norm"]
        params, state = change(grads, state, params)
    np.testing.assert_allclose(params.layers[0].mlp.up[...], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(params.layers[1].mlp_norm.weight[...], norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", 0.0, "learning_rate is 0.0: it must be a number above 0"),
        ("final_fraction", 1.5, "final_fraction is 1.5: it must be a number from 0 to 1"),
        ("clip_norm", -1.0, "clip_norm is -1.0: it must be a number above 0 or None"),
        ("accumulation", 0, "accumulation is 0: it must be a whole number of at least 1"),
        ("b2", 1.0, "b2 is 1.0: it must be a number of at least 0 and below 1"),
    ],
)
def test_a_bad_field_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{field: value})


def test_clipped_gradients_are_not_written_out():
    """An update in place of its arrays needs no room for another copy of the gradients."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), 10)
    weights = Decoder(
        UniformConfig(vocab_size=512, d_model=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16),
        jax.random.key(0),
    )
    state = optimizer.init(weights)

    def step(weights, state, grads):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, weights).compile()
    assert program.memory_analysis().temp_size_in_bytes < weights.embedding[...].nbytes / 2
