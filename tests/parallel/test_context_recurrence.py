"""Recurrences over the `context` axis: outputs and last states of the recurrence token by token, in float64."""

import jax
import numpy as np
import pytest

from streamjax.attention.elementwise_recurrence import elementwise_recurrence
from streamjax.attention.recurrent import recurrence
from streamjax.parallel.mesh import make_mesh
from tests.attention import test_elementwise_recurrence as elementwise
from tests.attention.test_recurrent import KINDS, ROWS, inputs
from tests.oracles import recurrent as oracle

LENGTH = 72


@pytest.mark.parametrize("strength", [0.05, pytest.param(60.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_is_the_recurrence(delta, channels, strength):
    """From a state that is not empty, over stretches with and without the beginning of a document."""
    given = inputs(delta, channels, strength, length=LENGTH)
    starts = np.zeros((ROWS, LENGTH), bool)
    starts[0, [5, 54]] = starts[1, 36] = True
    mesh = make_mesh(context=4, tensor=2)
    read = jax.jit(recurrence)
    with jax.set_mesh(mesh):
        program = read.lower(**given, resets=starts).compile()
        found = program(**given, resets=starts)
    for mine, right in zip(found, oracle.recurrence(**given, resets=starts), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-4)
    assert f"f32[{ROWS},{LENGTH // 4}," in program.as_text()
    assert f"f32[{ROWS},{LENGTH}," not in program.as_text()  # no device has the whole sequence


def test_is_the_recurrence_of_single_channels():
    given = elementwise.inputs(length=LENGTH)
    starts = np.zeros((elementwise.ROWS, LENGTH), bool)
    starts[0, [5, 54]] = starts[1, 36] = True
    with jax.set_mesh(make_mesh(context=4, tensor=2)):
        program = jax.jit(elementwise_recurrence).lower(*given, resets=starts).compile()
        found = program(*given, resets=starts)
    elementwise.close(found, elementwise.token_by_token(*given, starts))
    assert f"f32[{elementwise.ROWS},{LENGTH}," not in program.as_text()
