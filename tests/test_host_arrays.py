"""What NumPy does in the place of small programs is what JAX does, and compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler

X = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
CASES = {
    "an array": lambda x: jnp.asarray(X),
    "another type": lambda x: jnp.asarray(X.astype(np.int64), jnp.uint32),
    "doubles": lambda x: jnp.asarray(X / 7),
    "to whole numbers": lambda x: jnp.asarray(X * 1.5, jnp.int32),
    "to half the bits": lambda x: jnp.asarray(X / 7, jnp.bfloat16),
    "numbers": lambda x: jnp.array([3, 1, 4], jnp.int32),
    "zeros": lambda x: jnp.zeros((2, 3)),
    "all alike": lambda x: jnp.full((2, 5), np.float32(0.5)),
    "all alike, of any type": lambda x: jnp.full((2, 5), 3),
    "truths": lambda x: jnp.ones((2, 3), bool),
    "one of it": lambda x: x[1],
    "from behind": lambda x: x[-1, 1],
    "some of it": lambda x: x[:, 1:, ::2],
    "moved inside": lambda x: jax.lax.dynamic_slice(x, (1, -5, 3), (1, 2, 2)),
    "a copy": lambda x: jnp.copy(x),
    "another shape": lambda x: x.reshape(6, 4),
    "an axis more": lambda x: x[:, None],
    "repeated": lambda x: jnp.broadcast_to(x[0], (5, 3, 4)),
}
COMPILED = ("to whole numbers", "to half the bits", "all alike, of any type")


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_a_program(name, monkeypatch):
    x, compiled, compile = jax.device_put(X), [], compiler.backend_compile_and_load
    expected = jax.jit(lambda: CASES[name](jax.device_put(X)))()
    monkeypatch.setattr(compiler, "backend_compile_and_load", lambda *a: compiled.append(a) or compile(*a))
    found = CASES[name](x)
    np.testing.assert_array_equal(found, expected)
    assert (found.dtype, found.weak_type, found.committed) == (expected.dtype, expected.weak_type, False)
    assert name in COMPILED or not compiled


def test_nothing_is_shared():
    """What is written into an array later is not seen, and what lies on a mesh stays there."""
    numbers = np.zeros(1000, np.float32)
    kept = jnp.asarray(numbers)
    numbers[:] = 1
    assert not np.asarray(kept).any()
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])
    split = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a")))
    assert len(jnp.copy(split).devices()) == 2
    with jax.set_mesh(mesh):
        assert len(jnp.zeros(3).devices()) == 2
