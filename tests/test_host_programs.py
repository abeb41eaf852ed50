"""What the compiler is asked for where the host calls a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax import host_programs
from streamjax.host_programs import compiler_options, program


@pytest.fixture
def flags(monkeypatch):
    """Sets XLA_FLAGS as the options read them; the backend has long read its own."""

    def put(text: str) -> dict[str, str] | None:
        monkeypatch.setenv("XLA_FLAGS", text)
        compiler_options.cache_clear()
        return compiler_options()

    yield put
    compiler_options.cache_clear()


def test_options_that_a_user_has_named_are_left_alone(flags):
    usual = flags("")
    assert usual["xla_backend_optimization_level"] == "2"
    assert usual["xla_cpu_parallel_codegen_split_count"] == "4"
    named = flags("--xla_backend_optimization_level=3")
    assert named == {name: value for name, value in usual.items() if name != "xla_backend_optimization_level"}


def test_options_that_the_compiler_does_not_know_are_left_out(flags, monkeypatch):
    monkeypatch.setattr(host_programs, "_OPTIONS", {"xla_no_such_option": "1", "xla_backend_optimization_level": "2"})
    assert flags("") == {"xla_backend_optimization_level": "2"}
    monkeypatch.setattr(host_programs, "_OPTIONS", {"xla_no_such_option": "1"})
    assert flags("") is None


def test_a_program_so_compiled_computes_what_the_same_under_jit_does(flags):
    flags("")

    def attended(q, k, v):
        logits = jnp.where(jnp.tril(jnp.ones((24, 40), bool), 16), q @ k.T, -jnp.inf)
        return jax.nn.softmax(logits) @ v, jnp.sort(jnp.max(logits, axis=1))

    drawn = [np.random.default_rng(i).standard_normal((n, 32), np.float32) for i, n in enumerate((24, 40, 40))]
    for mine, theirs in zip(program()(attended)(*drawn), jax.jit(attended)(*drawn), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
