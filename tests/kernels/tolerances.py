"""How decoding kernels are run in interpreters, and how near they have to come to float64."""

import numpy as np
from jax.experimental.pallas import tpu as pltpu

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
BACKENDS = {
    "tpu": {"implementation": "tpu", "interpret": RACES},
    "triton": {"implementation": "triton", "interpret": True},
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def assert_near(found, expected, dtype):
    """Two partials: relative to the largest number, and nothing exactly where nothing was seen."""
    some = ~np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(found.lse), ~some)
    np.testing.assert_array_equal(np.asarray(found.out)[~some], 0.0)
    if some.any():
        for mine, right in ((found.out, expected.out), (np.asarray(found.lse)[some], expected.lse[some])):
            assert np.max(np.abs(np.asarray(mine, np.float64) - right)) < TOLERANCE[dtype] * np.max(np.abs(right))
