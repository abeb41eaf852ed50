"""Mixtures of experts: each token's experts one by one, the grouped product and its gradient, and what is read."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamjax.models.config import DenseConfig, ExpertsConfig
from streamjax.models.mlps import grouped_product
from streamjax.models.mlps.experts import Experts
from tests.oracles import streaming_llm

SHARED = ExpertsConfig(5, 2, 6, normalize_weights=False, shared=DenseConfig(10), shared_gate=True)
CONFIGS = {
    "two": ExpertsConfig(4, 2, 6),
    "one": ExpertsConfig(3, 1, 6, normalize_weights=False),
    "all": ExpertsConfig(3, 3, 6, activation="gelu"),
    "shared": SHARED,
    "biased": ExpertsConfig(4, 2, 6, bias=True, router_bias=True),
    "clamped": ExpertsConfig(4, 2, 6, bias=True, router_bias=True, swiglu_limit=0.7, swiglu_alpha=1.3),
    "weighted inputs": ExpertsConfig(
        4, 2, 6, normalize_weights=False, scores="sigmoid", weighted="inputs", shared=DenseConfig(10)
    ),
    "shared without a gate": dataclasses.replace(SHARED, shared_gate=False),
}


@pytest.mark.weekly("two", "all", "shared without a gate")
@pytest.mark.parametrize("name", CONFIGS)
def test_each_token_by_itself(name):
    with jax.enable_x64(True):
        module = Experts(CONFIGS[name], 8, jax.random.key(0), jnp.dtype("float64"))
        draw = np.random.default_rng(0)
        for bias in (module.router_bias, module.up_bias, module.down_bias):
            if bias is not None:
                bias[...] = jnp.asarray(draw.normal(size=bias.shape))
        x = draw.normal(size=(2, 7, 8))
        expected = [[streaming_llm.experts(module, CONFIGS[name], token) for token in row] for row in x]
        np.testing.assert_allclose(jax.jit(type(module).__call__)(module, jnp.asarray(x)), expected, atol=1e-12, rtol=0)


def one_by_one(rows, weights, sizes, cotangent):
    """Each row times its group's matrix, and the gradients of rows and matrices."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    matrices = np.stack([rows[group == g].T @ cotangent[group == g] for g in range(len(sizes))])
    product = np.einsum("nd,ndf->nf", rows, weights[group])
    return product, (np.einsum("nf,ndf->nd", cotangent, weights[group]), matrices)


@jax.jit
def by_groups(rows, weights, sizes, cotangent):
    """The same by CPU's tiles, and by what other devices compute."""
    found, pull = jax.vjp(lambda r, w: grouped_product.grouped_product(r, w, sizes), rows, weights)
    if not len(rows):
        return found, pull(cotangent), None
    elsewhere = (
        grouped_product._ragged(rows, weights, sizes, False),
        grouped_product._ragged(cotangent, weights, sizes, True),
        grouped_product._ragged_outer(rows, cotangent, sizes),
    )
    return found, pull(cotangent), elsewhere


@settings(deadline=None, max_examples=2 * settings.default.max_examples // 5)  # each compiles: 4, weekly 20
@example([0, 0], 0)
@example([17, 0, 40, 3], 1)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_the_grouped_product_and_its_gradient(sizes, seed):
    """Groups of all sizes, empty ones too, by CPU's tiles and by what other devices compute."""
    draw, count = np.random.default_rng(seed), sum(sizes)
    with jax.enable_x64(True):
        rows, weights, cotangent = (draw.normal(size=s) for s in ((count, 3), (len(sizes), 3, 4), (count, 4)))
        expected, gradients = one_by_one(rows, weights, sizes, cotangent)
        found, found_gradients, elsewhere = by_groups(rows, weights, np.asarray(sizes, np.int32), cotangent)
        pairs = [(found, expected), *zip(found_gradients, gradients, strict=True)]
        if count:
            pairs += zip(elsewhere, (expected, *gradients), strict=True)
        for mine, theirs in pairs:
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_columns_in_several_dimensions():
    draw, sizes = np.random.default_rng(0), jnp.asarray([3, 0, 4], jnp.int32)
    with jax.enable_x64(True):
        rows, weights = (jnp.asarray(draw.normal(size=s)) for s in ((9, 3), (3, 3, 2, 4)))
        cotangent = jnp.asarray(draw.normal(size=(9, 2, 4)))
        flat = (rows, weights.reshape(3, 3, 8))

        @jax.jit
        def all_forms(rows, weights, cotangent):
            expected, pull = jax.vjp(lambda r, w: grouped_product.grouped_product(r, w, sizes), *flat)
            found, pull_found = jax.vjp(lambda r, w: grouped_product.grouped_product(r, w, sizes), rows, weights)
            gradients = pull_found(cotangent), pull(cotangent.reshape(9, 8))
            return expected, found, *gradients, grouped_product._ragged(rows, weights, sizes, False)

        expected, found, mine, theirs, ragged = jax.tree.map(np.asarray, all_forms(rows, weights, cotangent))
        np.testing.assert_array_equal(found.reshape(9, 8), expected)
        np.testing.assert_array_equal(found[7:], 0)  # rows behind the last group's
        for gradient, right in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(gradient.reshape(right.shape), right)
        np.testing.assert_allclose(ragged.reshape(9, 8), expected, atol=1e-12)


def test_one_token_reads_its_own_experts_alone():
    """No array in the compiled program is as large as all experts, but for the weights that it is given."""
    config = ExpertsConfig(64, 2, 32)
    module = Experts(config, 32, jax.random.key(0), jnp.dtype("float32"))
    compiled = jax.jit(type(module).__call__).lower(module, jnp.ones((1, 1, 32))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * 32 * 32 / 4
    body = re.findall(r"= f32\[64,[\d,]+\][^ ]* (\w+[\w-]*)\(", compiled.as_text())
    assert set(body) <= {"parameter", "get-tuple-element", "bitcast", "copy-start"}
