"""The inverse of small unit triangular matrices, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.triangular_inverse import unit_lower_inverse

inverse = jax.jit(unit_lower_inverse)


@pytest.mark.parametrize("size", [1, 8, 13, 64])
def test_against_float64(size):
    below = np.tril(np.random.default_rng(size).standard_normal((2, 3, size, size)), -1) / np.sqrt(size)
    found = inverse(jnp.array(below, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(size) + below), rtol=1e-4, atol=1e-5)


def test_equal_keys_need_no_large_numbers():
    """All ones below: powers of that have entries of 10^17, and the inverse has 1 and -1."""
    found = inverse(np.tri(64, k=-1, dtype=np.float32))
    np.testing.assert_array_equal(found, np.eye(64) - np.eye(64, k=-1))


def test_the_derivative_is_that_of_the_inverse():
    rng = np.random.default_rng(0)
    below, weights = np.tril(rng.standard_normal((12, 12)), -1) / 3, rng.standard_normal((12, 12))
    with jax.enable_x64(True):
        given = jnp.array(below)
        found = jax.jit(jax.grad(lambda x: jnp.sum(unit_lower_inverse(x) * weights)))(given)
        want = jax.jit(jax.grad(lambda x: jnp.sum(jnp.linalg.inv(jnp.eye(12) + x) * weights)))(given)
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
