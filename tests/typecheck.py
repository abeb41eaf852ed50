"""The run-time type checker of the suite: beartype, ints welcome where floats are annotated, and jaxtyping's shapes.

A constructor is checked when it is given an array. Without one it may be JAX that rebuilds a pytree from placeholders
(shapes, shardings, flags), which no annotation of arrays fits.

jaxtyping's own decorator makes two checkers of a function, binds the arguments of every call, and does so for functions
that know no arrays and for those without annotations, closures in what is traced included: a tenth of a second for a
thousand calls. Here a function has one checker, and sizes of axes are noted for those whose annotations have some.
"""

import functools
import inspect
import re
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))
_ARRAYS = re.compile(r"\b(Bool|Complex|Float|Inexact|Int|Key|Num|Real|Shaped|UInt)\d*\[")
_jaxtyped = jaxtyping.jaxtyped


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


def jaxtyped(*, typechecker):
    """What jaxtyping's import hook puts on every function and class, in the place of its own."""
    original = _jaxtyped(typechecker=typechecker)

    def decorate(found):
        if not inspect.isfunction(found) or inspect.isgeneratorfunction(found) or found.__name__ == "__init__":
            return original(found)
        written = found.__annotations__
        if not written:
            return found
        hints = {name: _evaluated(hint, found.__globals__) for name, hint in written.items()}
        arrays = any(_ARRAYS.search(repr(hint)) for hint in hints.values())
        if not arrays and "<locals>" in found.__qualname__:
            return found  # made anew at each call of the function around it
        found.__annotations__ = hints
        try:
            strict = checked(found)
        finally:
            found.__annotations__ = written
        strict = _jaxtyped(typechecker=None)(strict) if arrays else strict

        @functools.wraps(found)
        def call(*args, **kwargs):
            return (found if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

        return call

    return decorate


def _evaluated(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation that is text, as what it says; what only type checkers import is anything."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except (NameError, AttributeError, TypeError):
        return Any
