"""What a run compiles: `python -m pytest -p no:xdist -p tests.compiled_programs FILES` ends with a table of programs.

By the CPU seconds that each takes: how many there are, what they take together, and how many were compiled before in
this run, as another closure or behind `jax.clear_caches`.
"""

import hashlib
import time
from collections.abc import Sequence

import pytest

BOUNDS = 0.012, 0.05, 0.15, float("inf")  # CPU seconds; an operation outside of `jax.jit` takes some 0.01
_found: list[tuple[float, str]] = []


def table(programs: Sequence[tuple[float, str]]) -> list[str]:
    """Lines of the table, of (CPU seconds, what tells it from others) of each program, in order."""
    lines, below, known = [], 0.0, set()
    again = [text in known or known.add(text) is not None for _, text in programs]
    for bound in BOUNDS:
        inside = [(seconds, old) for (seconds, _), old in zip(programs, again, strict=True) if below <= seconds < bound]
        taken, repeated = sum(seconds for seconds, _ in inside), sum(seconds for seconds, old in inside if old)
        lines.append(
            f"from {below:5.3f} s: {len(inside):6,} programs, {taken:7.1f} CPU seconds; "
            f"{sum(old for _, old in inside):6,} of them again, {repeated:7.1f}"
        )
        below = bound
    return lines


def pytest_configure() -> None:
    from jax._src import compiler  # behind conftest, whose environment JAX is to find

    original = compiler.backend_compile_and_load

    def timed(backend, module, *rest):
        text = module.operation.get_asm(enable_debug_info=False)
        start = time.process_time()
        try:
            return original(backend, module, *rest)
        finally:
            _found.append((time.process_time() - start, hashlib.sha256(text.encode()).hexdigest()))

    compiler.backend_compile_and_load = timed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("programs")
    for line in table(_found):
        terminalreporter.write_line(line)
