"""Eight virtual CPU devices for the whole suite, and run-time checks of the shapes that annotations state.

Most programs here run once, on a few tokens: compiling them is what takes the time. They are compiled with little
optimisation by LLVM (all of XLA's own passes run, so what tests read in compiled text is as users have it).
"""

import ctypes
import functools
import gc
import os
import threading
from importlib.metadata import version
from pathlib import Path

gc.disable()  # until all is imported and collected: half a million objects that stay
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
flags.append(
    "--xla_cpu_parallel_codegen_split_count=1"
)  # the workers share the cores already; parts cost a quarter more
if version("jaxlib") < "0.11":  # newer ones have no such flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
# XLA ends a process in which one of the eight devices is 40 seconds late for a collective. A busy machine can do that.
flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
flags += [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
os.environ["XLA_FLAGS"] = " ".join(flags)

import jaxtyping

import tests.typecheck

jaxtyping.jaxtyped = tests.typecheck.jaxtyped
jaxtyping.install_import_hook(["streamjax", "pallas_kernels"], "tests.typecheck.checked")

import jax
import pytest
from hypothesis import Phase, settings
from jax._src.interpreters import mlir

from tests import host_arrays
from tests.covering import mark_the_rest_slow

pytest_plugins = ["tests.cpu_seconds"]

settings.register_profile("suite", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("weekly", deadline=None, max_examples=50, derandomize=True)
# To see that a test fails: what was drawn first will do.
settings.register_profile("unshrunk", settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("suite")


if not os.environ.get("PLAIN_JAX"):  # which the weekly job sets
    host_arrays.install()


@functools.cache
def mlir_context(thread: int):
    """One for all programs; JAX makes one for each, which takes 4 ms, and 1.2 MB for as long as the program is kept."""
    return mlir.make_ir_context()


_start = mlir.ModuleContext.__init__


@functools.wraps(_start)
def _start_in_one_context(self, *, context=None, **options) -> None:
    _start(self, context=context or mlir_context(threading.get_ident()), **options)


mlir.ModuleContext.__init__ = _start_in_one_context

MEMORY_MAPS = Path("/proc/self/maps")
MANY_MAPS = 40_000  # Linux lets a process have 65,530, and every compiled program takes some
RESIDENT_PAGES = Path("/proc/self/statm")
# In bytes. What the suite imports takes 0.9e9, and 0.4e9 more never come back: a limit near that forgets behind every
# file, which takes half a second, and then the next file compiles again what all tests share.
BETWEEN_FILES, BETWEEN_TESTS = 2.0e9, 2.4e9


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_slow(items)


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make, and seldom: a tenth of the suite's time went into looking."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget compiled programs where they have become too many: each takes memory and three maps or more, and where a
    process has all the maps that it may have, the compiler aborts it. Later tests of the same file may use them again,
    so there they stay for longer.
    """
    if not RESIDENT_PAGES.exists():
        return
    resident = int(RESIDENT_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    same_file = nextitem is not None and nextitem.path == item.path
    many = not same_file and MEMORY_MAPS.read_bytes().count(b"\n") > MANY_MAPS
    if many or resident > (BETWEEN_TESTS if same_file else BETWEEN_FILES):
        jax.clear_caches()
        mlir_context.cache_clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what LLVM has freed goes back to the system only when asked for
