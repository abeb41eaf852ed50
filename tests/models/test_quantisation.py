"""Quantised weights: their numbers against a float64 oracle, and products against those of dequantised weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import streamjax as sj
from streamjax.models.calibration import error_factor, output_moments
from streamjax.models.families import read_config
from streamjax.models.mlps.grouped_product import grouped_product
from streamjax.models.parameters import product
from streamjax.models.quantisation import QuantisedKernel, QuantisedWeight, merge_axes
from streamjax.models.quantising import (
    as_weight,
    check_weights,
    pack,
    quantised_model,
    quantised_parts,
    unpack,
    weights_of,
    with_codes,
)
from streamjax.models.rounding import quantise
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.architectures import CASES
from tests.covering import rest_slow
from tests.models.random_decoders import random_decoder
from tests.streaming.tiny_models import build

pytestmark = pytest.mark.quick
KINDS = ("int8", "int4")
CONFIG = sj.UniformConfig(
    vocab_size=160, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96, tie_embeddings=True
)


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(values, inputs, weights, layout="cpu"):
    inputs = [axis - values.ndim for axis in inputs]
    parts = quantised_parts(values.__getitem__, values.shape, inputs, weights, layout)
    return as_weight([jnp.asarray(part) for part in parts], inputs[-1])


def dequantised(model):
    """The model with plain weights, those that its codes stand for."""
    leaves, structure = jax.tree.flatten(model)
    copy = jax.tree.unflatten(structure, leaves)
    for _, module in list(nnx.iter_modules(copy)):
        for name, node in list(vars(module).items()):
            if isinstance(node, QuantisedKernel):
                setattr(module, name, nnx.Param(node[...].astype(jnp.float32), axes=node.get_metadata("axes")))
    return copy


@given(st.integers(0, 1000), st.sampled_from([(0,), (0, 1), (1,)]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_int8_is_the_nearest_code_of_each_channel(seed, inputs, size):
    values = drawn((3, 5, 4), seed) * np.float32(size)
    values[:, :, 1] = 0
    codes, scales = quantise(values, inputs, "int8")
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(axis=inputs, keepdims=True)
    np.testing.assert_allclose(scales, np.maximum(largest / 127, np.finfo(np.float32).tiny), rtol=1e-6)
    assert np.abs(codes * scales.astype(np.float64) - exact).max() <= 0.5001 * scales.max()
    assert not codes[:, :, 1].any()
    assert codes.dtype == np.int8


def test_ties_go_to_the_even_code():
    codes, _ = quantise(np.array([[127], [2.5], [3.5], [-0.5]], np.float32), (0,), "int8")
    assert codes[:, 0].tolist() == [127, 2, 4, 0]


def oracle_error(group):
    """The squared error of the plain rule: 16 levels from the lowest weight to the highest one, in float64."""
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    scale = (high - low) / 15
    return np.square(np.clip(np.rint((group - low) / scale), 0, 15) * scale + low - group).sum()


@given(st.integers(0, 1000), st.sampled_from([64, 40, 24]), st.sampled_from([1e-3, 1.0]))
def test_int4_groups_are_no_worse_than_levels_over_their_range(seed, width, size):
    values = drawn((width, 6), seed) * np.float32(size)
    values[:, 2] = 0
    weight = quantised(values, (0,), "int4")
    found = np.asarray(weight.astype(jnp.float32), np.float64)
    group = np.gcd(width, 32)
    assert weight.scales.shape == weight.offsets.shape == (width // group, 6)
    assert not found[:, 2].any()
    for start in range(0, width, group):
        for column in (0, 1, 3, 4, 5):
            part = slice(start, start + group), column
            exact = values[part].astype(np.float64)
            assert np.square(found[part] - exact).sum() <= 1.1 * oracle_error(exact)


def test_weights_of_four_bits_stay_what_they_were():
    """Levels of GGUF's Q4_0 and Q4_1, with scales and minima that are no round numbers."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 16, (8, 4, 32))
    levels[..., :2] = 0, 15
    scales = rng.uniform(0.01, 0.1, (8, 4, 1))
    values = ((levels - rng.uniform(7, 8, (8, 4, 1))) * scales).astype(np.float32).reshape(8, 128)
    found = quantised(values, (1,), "int4").astype(jnp.float32)
    assert np.abs(found - values).max() < 0.06 * scales.max()


def test_what_weighs_more_is_kept_better():
    """Whether the weight of a channel is its own, or some direction that all channels have a part in."""
    rng, values = np.random.default_rng(0), drawn((64, 300))
    mean = rng.standard_normal(64)
    for moments, share in (
        (np.diag(np.tile([100.0, 1, 1, 1], 16)), 0.85),
        (0.1 * np.eye(64) + np.outer(mean, mean), 0.3),
    ):

        def error(factor, moments=moments):
            codes, offsets, scales = quantise(values, (0,), "int4", factor)
            weight = QuantisedWeight(jnp.asarray(codes), jnp.asarray(offsets), jnp.asarray(scales), -2)
            errors = np.asarray(weight.astype(jnp.float32)) - values
            return np.sum(errors * (moments @ errors))

        assert error(error_factor(moments)) < share * error(None)


@pytest.mark.parametrize("tied", rest_slow([True, False], True))
def test_the_output_matrix_is_chosen_by_what_it_meets(tied):
    """Hidden states with a large mean, of which errors of plain rounding make errors of every logit."""
    model = random_decoder(CONFIG.replace(tie_embeddings=tied))
    direction = np.random.default_rng(0).standard_normal(64)
    for block in model.layers:
        block.mlp.down.set_value(block.mlp.down.get_value() * 0.1)
    model.embedding.set_value(model.embedding.get_value() + 3 * direction.astype(np.float32))
    found = quantised_model(model, "int4")
    exact = np.asarray((model.embedding if tied else model.head).get_value())
    parts = as_weight([jnp.asarray(x) for x in quantise(exact, (-1 if tied else 0,), "int4")], -1 if tied else -2)
    hidden = np.asarray(model.hidden(jnp.arange(150)[None]))[0]

    def error(matrix):
        errors = np.asarray(matrix.astype(jnp.float32)) - exact
        return np.square(hidden @ (errors.T if tied else errors)).mean()

    assert error((found.embedding if tied else found.head).value) < 0.5 * error(parts)


def test_without_finite_hidden_states_the_last_norm_says_what_counts():
    model = random_decoder(CONFIG)
    model.layers[1].mlp.down.set_value(model.layers[1].mlp.down.get_value().at[0, 0].set(np.nan))
    rows = lambda ids: np.asarray(model.embedding.get_value())[ids]  # noqa: E731
    expected = np.diag(np.square(np.asarray(model.norm.weight.get_value())))
    np.testing.assert_array_equal(output_moments(model, rows), expected)


def test_packing_puts_the_first_half_of_a_group_in_the_lower_halves_of_its_bytes():
    codes = np.arange(64).reshape(64, 1) % 16 - 8
    packed = pack(codes, 0)
    assert packed.dtype == np.uint8
    assert packed.shape == (32, 1)
    assert packed[3, 0] == (codes[3, 0] + 8) | (codes[19, 0] + 8) << 4
    assert packed[16, 0] == (codes[32, 0] + 8) | (codes[48, 0] + 8) << 4


@given(st.integers(0, 1000), st.sampled_from([(64, 3), (3, 40), (2, 16, 5)]))
def test_unpacking_undoes_packing(seed, shape):
    codes = np.random.default_rng(seed).integers(-8, 8, shape)
    axis = int(np.argmax(shape))
    np.testing.assert_array_equal(unpack(pack(codes, axis), axis), codes)


def test_an_axis_without_groups_is_refused_in_one_line():
    config = CONFIG.replace(mlp_dim=36)
    with pytest.raises(ValueError, match=r"weights is 'int4', and layers.0.mlp.down: .* axis of 36 .* take int8"):
        quantised_model(random_decoder(config), "int4")


@pytest.mark.parametrize("wrong", ["int3", "INT8", 4, ""])
def test_a_wrong_kind_is_told_with_the_choices(wrong):
    with pytest.raises(ValueError, match="choose from int8, int4, or None"):
        check_weights(wrong)


PRODUCTS = {
    "in": ("bte,egf->btgf", (2, 3, 64), (64, 2, 24), (0,)),
    "heads": ("bthd,hde->bte", (2, 3, 4, 16), (4, 16, 40), (0, 1)),
    "table": ("bte,ve->btv", (2, 3, 64), (96, 64), (1,)),
    "absorbed": ("bthd,rhd->bthr", (2, 3, 4, 6), (32, 4, 6), (0,)),
    "behind": ("bthr,rhd->bthd", (2, 3, 4, 32), (32, 4, 6), (0,)),
}


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_dequantised_weight(name, weights, layout):
    equation, x_shape, shape, inputs = PRODUCTS[name]
    x = jnp.asarray(drawn(x_shape, 1))
    weight = quantised(drawn(shape), inputs, weights, layout)
    if name == "heads":  # as the output projection of attention has them
        equation, x = "btf,fe->bte", x.reshape(2, 3, -1)
        weight = merge_axes(weight, 0, 2)
    dense = weight.astype(jnp.float32)
    exact = partial(jnp.einsum, equation, precision="highest")
    apply = lambda x, w: product(equation, x, w)  # noqa: E731
    np.testing.assert_allclose(jax.jit(apply)(x, weight), exact(x, dense), atol=2e-4)
    np.testing.assert_allclose(jax.jit(apply)(x[:1, :1], weight), exact(x[:1, :1], dense), atol=2e-4)
    half = product(equation, x.astype(jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact(x, dense), atol=0.5)

    def loss(x, w, apply):
        return jnp.sum(jnp.sin(apply(x, w)))

    found, wanted = jax.grad(loss)(x, weight, apply), jax.grad(loss)(x, dense, exact)
    np.testing.assert_allclose(found, wanted, atol=3e-4)


@pytest.mark.parametrize("weights", KINDS)
def test_grouped_products_and_their_gradient(weights):
    rows, sizes = jnp.asarray(drawn((9, 32), 1)), jnp.array([4, 0, 5], jnp.int32)
    weight = quantised(drawn((3, 32, 2, 12)), (1,), weights)
    weight, dense = merge_axes(weight, 2, 4), merge_axes(weight.astype(jnp.float32), 2, 4)
    np.testing.assert_allclose(grouped_product(rows, weight, sizes), grouped_product(rows, dense, sizes), atol=1e-5)
    found, wanted = (
        jax.grad(lambda x, w=w: jnp.sum(jnp.sin(grouped_product(x, w, sizes))))(rows) for w in (weight, dense)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


WIDE = {"hidden_size": 32, "intermediate_size": 48}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "v_head_dim": 8, "moe_intermediate_size": 16}


def config_of(name):
    changes = {**WIDE, **(LATENT if name == "deepseek_v3" else {})}
    changes |= {} if name in ("llama", "deepseek_v3") else {"head_dim": 8}
    changes |= {"moe_intermediate_size": 16} if name == "qwen3_moe" else {}
    return read_config({**CASES[name], **changes, "model_type": name.replace("gemma3", "gemma3_text")})


@pytest.mark.usual("llama-int4")
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_a_quantised_model_is_its_dequantised_one_whole_and_streamed(name, weights):
    model = random_decoder(config_of(name))
    packed = quantised_model(model, weights)
    assert weights_of(packed) == weights
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 14)))
    expected = sj.forward(dequantised(packed), tokens)
    np.testing.assert_allclose(sj.forward(packed, tokens), expected, atol=3e-4)
    state = sj.init_state(packed, sj.kv.preset("dense", capacity=16), batch_size=2)
    for start, stop in ((0, 13), (13, 14)):
        state, logits = sj.step(packed, state, tokens[:, start:stop])
        np.testing.assert_allclose(logits, expected[:, start:stop], atol=3e-4)
    native = with_codes(packed, "tpu")
    if name == "llama":
        np.testing.assert_allclose(sj.forward(native, tokens), expected, atol=3e-4)
    jax.tree.map(np.testing.assert_array_equal, with_codes(with_codes(native, "gpu"), "cpu"), packed)


@pytest.mark.slow
@pytest.mark.parametrize("weights", KINDS)
def test_codes_and_scales_lie_on_a_mesh_as_the_weight_does(weights):
    model = quantised_model(build(CONFIG), weights)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    placed = shard_model(model, mesh)
    up = placed.layers[0].mlp.up
    assert up.codes.get_value().sharding.spec == up.scales.get_value().sharding.spec or weights == "int8"
    assert up.codes.get_value().sharding.shard_shape(up.codes.shape)[-1] == 96 // 2
    tokens = jnp.arange(24).reshape(2, 12)
    with jax.set_mesh(mesh):
        found = sj.forward(placed, tokens)
    np.testing.assert_allclose(found, sj.forward(model, tokens), atol=1e-4)


@pytest.mark.usual("int4")
@pytest.mark.parametrize("weights", KINDS)
def test_decoding_holds_no_dequantised_weight(weights):
    config = CONFIG.replace(d_model=256, mlp_dim=2048, num_layers=1, vocab_size=8192)
    model = quantised_model(random_decoder(config), weights)
    state = sj.init_state(model, sj.kv.preset("window", window=8))
    tokens = jnp.zeros((1, 1), jnp.int32)
    compiled = jax.jit(lambda m, s, t: sj.step(m, s, t)).lower(model, state, tokens).compile()
    plain = 2 * (config.expand().parameter_count)  # bytes as bfloat16
    parts = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    moved = {"int8": 0.55, "int4": 0.32}[weights] * plain
    assert parts < moved  # all of which is read, and nothing of the size of a weight is written beside it
    temporaries = compiled.memory_analysis().temp_size_in_bytes  # of int4, both halves of a group's 32 rows
    assert temporaries < 1.2 * 256 * 2048  # a copy of the scales alone takes it to 1.9; the smallest weight has 4


def test_quantising_twice_is_refused():
    model = quantised_model(random_decoder(CONFIG), "int8")
    assert quantised_model(model, "int8") is model
    with pytest.raises(ValueError, match="weights are int8: load the model that they were made of to have int4"):
        quantised_model(model, "int4")


def test_int4_codes_of_accelerators_have_four_bits():
    weight = quantised(drawn((64, 8)), (0,), "int4", "tpu")
    assert weight.codes.dtype == jnp.int4
    assert np.asarray(weight.codes).dtype == ml_dtypes.int4
    assert dataclasses.replace(weight).shape == (64, 8)
