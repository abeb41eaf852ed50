"""Blocks that are worked on together leave no rest, where a divisor is near."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.attention.block_cutting import even_batch, even_size

pytestmark = pytest.mark.quick


@given(blocks=st.integers(1, 600), most=st.integers(0, 700))
def test_a_batch_is_at_most_what_fits_and_half_of_it_at_least(blocks, most):
    size = even_batch(blocks, most)
    assert 1 <= size <= max(1, min(blocks, most))
    assert 2 * size >= min(blocks, most)


@given(blocks=st.integers(0, 10).map(lambda n: 2**n), most=st.integers(1, 700))
def test_a_chunk_of_a_usual_width_leaves_no_rest(blocks, most):
    """`jax.lax.map` has its body once then, and twice with a rest."""
    assert blocks % even_batch(blocks, most) == 0


@given(length=st.integers(1, 9000), most=st.integers(1, 3000))
def test_equal_blocks_are_as_few_and_as_small_as_can_be(length, most):
    size = even_size(length, most)
    fewest = next(count for count in range(1, length + 1) if count * most >= length)
    assert size <= most
    assert fewest * size >= length > fewest * (size - 1)


def test_a_rest_is_a_second_body():
    """What this is for: still so in the installed JAX."""

    def bodies(batch: int) -> int:
        return str(jax.make_jaxpr(lambda x: jax.lax.map(jnp.sin, x, batch_size=batch))(jnp.zeros(512))).count(" sin ")

    assert (bodies(21), bodies(even_batch(512, 21))) == (2, 1)
