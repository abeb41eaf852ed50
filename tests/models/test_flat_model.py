"""A flat model is the model: its parameters in their places, in programs that equal models share."""

import jax
import numpy as np

from streamjax.models.decoder import FlatModel
from tests.streaming.tiny_models import GQA, build


def test_a_flat_model_is_the_model_in_a_program_that_equal_ones_share():
    first, second = build(GQA), build(GQA, seed=1)
    program = jax.jit(lambda flat: jax.tree.map(lambda x: 2 * x, flat.model))
    for model in (first, second):
        found = program(FlatModel(model))
        assert type(found) is type(model)
        assert jax.tree.structure(found) == jax.tree.structure(model)
        for mine, own in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(mine, 2 * own)
    assert program._cache_size() == 1
