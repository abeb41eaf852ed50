"""A few rows times codes of four bits, held against float64 over what the codes stand for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api
from streamjax.models import quantisation
from streamjax.models.quantisation import QuantisedWeight
from streamjax.models.quantising import pack
from streamjax.models.rounding import quantise


def drawn(rows, inputs, outputs, axis, weights="int4"):
    random = np.random.default_rng([rows, inputs, outputs])
    dense = random.normal(size=(inputs, outputs) if axis == -2 else (outputs, inputs)).astype(np.float32)
    parts = quantise(dense, (axis,), weights)
    if weights == "int4":
        codes, offsets, scales = parts
        weight = QuantisedWeight(*map(jnp.asarray, (pack(codes, axis), offsets, scales)), axis)
    else:
        weight = QuantisedWeight(jnp.asarray(parts[0]), None, jnp.asarray(parts[1]), axis)
    x = jnp.asarray(random.normal(size=(rows, inputs)), jnp.float32)
    exact = np.asarray(jax.jit(lambda weight: weight.astype(jnp.float32))(weight), np.float64)
    return x, weight, np.asarray(x, np.float64) @ (exact if axis == -2 else exact.T)


@settings(max_examples=4)
@given(
    rows=st.integers(1, 16),
    inputs=st.sampled_from([8, 48, 96, 576]),  # groups of 8, 16 and 32
    outputs=st.integers(1, 130),
    axis=st.sampled_from([-1, -2]),
    splits=st.sampled_from([None, 1, 3]),
)
def test_the_product_is_that_of_what_the_codes_stand_for(rows, inputs, outputs, axis, splits):
    x, weight, expected = drawn(rows, inputs, outputs, axis)
    codes = weight.codes, weight.offsets, weight.scales
    run = jax.jit(partial(api.grouped_product, outputs_first=axis == -1, splits=splits, interpret=True))
    found = run(x, *codes)
    np.testing.assert_allclose(found, expected, atol=2e-6 * inputs**0.5 * np.abs(expected).max(), rtol=0)


def test_too_many_rows_and_no_kernel_are_refused():
    x, weight, _ = drawn(17, 32, 8, -2)
    codes = weight.codes, weight.offsets, weight.scales
    with pytest.raises(ValueError, match="17 rows: the kernel takes 16"):
        api.grouped_product(x, *codes, interpret=True)
    with pytest.raises(ValueError, match="no grouped_product for cpu"):
        api.grouped_product(x[:1], *codes)


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(("axis", "equation"), [(-2, "bte,ef->btf"), (-1, "bte,ve->btv")])
def test_what_a_gpu_computes_is_the_product(rows, axis, equation, weights, monkeypatch):
    """The branch of GPUs, its kernel in an interpreter: with 17 rows XLA's product, with one row of int8 a second."""
    right, called = api.grouped_product, []

    def interpreted(*args, implementation, **more):
        called.append(implementation)
        return right(*args, **more, interpret=True)

    monkeypatch.setattr(api, "grouped_product", interpreted)
    x, weight, expected = drawn(rows, 96, 40, axis, weights)
    found = quantisation._on_gpu(equation, jnp.float32, x[None], weight)
    assert called == (["triton"] if weights == "int4" and rows <= 16 else [])
    assert found.shape == (1, rows, 40)
    np.testing.assert_allclose(found[0], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
