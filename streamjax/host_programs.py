"""`program`: `jax.jit` for programs that the host calls, compiled in less time on CPUs.

XLA's CPU backend can write the loops of fused operations in two ways. The newer one, the default of jaxlib 0.10, takes
up to two thirds longer to compile what a layer of a stream is, and the programs run as fast
(`benchmarks.caches.compile_time`). So the older one is asked for, where there is a choice. LLVM optimises at its second
level and not at its third, which is a third less work for a layer of pages; what such a layer computes is the same to
the bit, and takes as long. A program is made in four parts at a time and not in 32, which takes a tenth off the CPU
seconds and is done as soon. A jaxlib that knows no such option, and a user who has named it in XLA_FLAGS, are left
alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")
_OPTIONS = {
    "xla_cpu_use_fusion_emitters": "False",
    "xla_backend_optimization_level": "2",
    "xla_cpu_parallel_codegen_split_count": "4",
}


class Program(Generic[P, R]):
    """A function under `jax.jit`. What it is compiled for, and so how, is looked up at the first call."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self._function, compiler_options=compiler_options(), **self._options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        found: R = self._jitted(*args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        """`lower`, `clear_cache` and the like."""
        return getattr(self._jitted, name)


def program(**options: Any) -> Callable[[Callable[P, R]], Program[P, R]]:
    """A decorator for functions that are called from the host, not under a transformation; options of `jax.jit`.

    >>> @program(static_argnames="scored")
    ... def finished(model, state, scored): ...
    """
    return lambda function: Program(function, options)


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """What the compiler of the default backend is asked for; None where nothing is."""
    if jax.default_backend() != "cpu":
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in _OPTIONS.items() if name not in flags}
    if not _known(options):
        options = {name: value for name, value in options.items() if _known({name: value})}
    return options or None


def _known(options: dict[str, str]) -> bool:
    """Whether the compiler takes options."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
