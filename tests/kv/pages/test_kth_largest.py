"""The least of the best, by bits, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamjax.kv.pages.kth_largest import kth_largest

FLOATS = st.floats(width=32, allow_nan=False)
find = jax.jit(kth_largest, static_argnums=1)


@given(hnp.arrays(np.float32, (2, 3, 7), elements=FLOATS), st.integers(1, 7))
def test_it_is_what_sorting_finds(scores, k):
    found = np.asarray(find(jnp.asarray(scores), k))[..., 0]
    np.testing.assert_array_equal(found, np.sort(scores, axis=-1)[..., -k])


def test_equal_scores_count_each_by_itself():
    scores = jnp.array([2.0, 5.0, 5.0, 5.0, -1.0])
    assert [float(kth_largest(scores, k)[0]) for k in range(1, 6)] == [5, 5, 5, 2, -1]


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="of 5 scores"):
        kth_largest(jnp.zeros(5), 6)
