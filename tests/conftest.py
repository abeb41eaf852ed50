"""Eight virtual CPU devices for the whole suite, and run-time checks of the shapes that annotations state.

Most programs here run once, on a few tokens: compiling them is what takes the time. They are compiled with little
optimisation by LLVM (all of XLA's own passes run, so what tests read in compiled text is as users have it).
"""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib") < "0.11":  # newer ones have no such flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
flags += [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
os.environ["XLA_FLAGS"] = " ".join(flags)

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook names it, and does not import it

install_import_hook(["streamjax", "pallas_kernels"], "tests.typecheck.checked")

import jax
import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("suite")

PROCESS_MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000  # Linux lets a process have 65,530, and every compiled program takes some


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Behind a file of tests, once its process has many programs: one too many and the compiler aborts the process."""
    yield
    if PROCESS_MAPS.exists() and PROCESS_MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
