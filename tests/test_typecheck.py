"""What the suite's type checker refuses: arrays of other shapes and kinds, and values of other types."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Array, Float, Int32, TypeCheckError

import streamjax as sj
from pallas_kernels.patterns import Full
from streamjax.attention.flash import flash_attention
from tests.typecheck import checked, jaxtyped

WRONG = (BeartypeCallHintViolation, TypeCheckError)
decorate = jaxtyped(typechecker=checked)


@decorate
def product(a: "Float[Array, 'M K']", b: Float[Array, "K N"], scale: float = 1.0) -> Float[Array, "M N"]:
    return scale * (a @ b if b.shape != (2, 5) else a)


def test_sizes_of_axes_agree_and_kinds_do():
    a, b = jnp.ones((3, 2)), jnp.ones((2, 4))
    assert product(a, b).shape == (3, 4)
    assert product(a, b, 2).shape == (3, 4)  # an int where a float is annotated
    for wrong in ((a, jnp.ones((3, 4))), (a[0], b), (a.astype(int), b), (a, b, "2"), (np.ones((3, 2)), b)):
        with pytest.raises(WRONG):
            product(*wrong)
    with pytest.raises(WRONG):
        product(a, jnp.ones((2, 5)))  # what it returns has other sizes


def test_sizes_in_one_call_are_none_in_another():
    assert product(jnp.ones((1, 2)), jnp.ones((2, 3))).shape == (1, 3)
    assert product(jnp.ones((7, 6)), jnp.ones((6, 5))).shape == (7, 5)


def test_values_that_are_no_arrays():
    @decorate
    @dataclass
    class Part:
        x: Int32[Array, " N"]

    with pytest.raises(WRONG):
        Part(jnp.ones(3))
    with pytest.raises(WRONG):
        sj.kv.preset(3)


def test_the_library_is_checked():
    with pytest.raises(WRONG):
        flash_attention(*[jnp.ones((1, 3, 2))] * 3, Full(), scale=1.0)
