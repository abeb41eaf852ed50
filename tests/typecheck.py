"""The run-time type checker of the suite: beartype, with ints welcome where floats are annotated.

A constructor is checked when it is given an array. Without one it may be JAX that rebuilds a pytree from placeholders
(shapes, shardings, flags), which no annotation of arrays fits.
"""

import functools

import jax
import numpy as np
from beartype import BeartypeConf, beartype

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """`function` with its annotations enforced."""
    strict = _strict(function)
    if function.__name__ != "__init__":
        return strict

    @functools.wraps(function)
    def construct(*args, **kwargs):
        arrays = any(isinstance(value, jax.Array | np.ndarray) for value in (*args, *kwargs.values()))
        return (strict if arrays else function)(*args, **kwargs)

    return construct
