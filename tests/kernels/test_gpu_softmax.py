"""Exponentials of the GPU kernels: what their instructions compute, run by hand, is what is interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import exponentials

OPERATIONS = {
    "fma.rn.f32": lambda a, b, c: a * b + c,
    "mul.f32": np.multiply,
    "add.f32": np.add,
    "ex2.approx.ftz.f32": np.exp2,
    "rcp.approx.ftz.f32": np.reciprocal,
}


def run_ptx(asm, *, args, constraints, pack, result_shape_dtypes):
    """The few instructions of PTX that there are, in float32; $0 is the result."""
    assert constraints == ",".join(["=f", *["f"] * len(args)])
    assert pack == 1
    registers = {f"${i}": np.asarray(x, np.float32) for i, x in enumerate(args, 1)}

    def value(name):
        return np.uint32(int(name[2:], 16)).view(np.float32) if name.startswith("0f") else registers[name]

    for line in filter(None, (line.strip() for line in asm.split(";"))):
        name, _, rest = line.partition(" ")
        target, *operands = (x.strip() for x in rest.split(","))
        values = [value(x).astype(np.float64) for x in operands]
        with np.errstate(over="ignore"):
            found = OPERATIONS[name](*values).astype(np.float32)
        registers[target] = np.where(np.abs(found) < np.finfo(np.float32).tiny, np.float32(0), found)
    [result] = result_shape_dtypes
    assert registers["$0"].shape == result.shape
    return [jnp.asarray(registers["$0"])]


@pytest.mark.parametrize("factor", [0.125 * np.log2(np.e), 1.0, 3.7e-3])
def test_its_instructions_are_its_interpreted_form(factor, monkeypatch):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((5, 7)) * 30, jnp.float32)
    shift = jnp.asarray(random.standard_normal((5, 1)) * 3, jnp.float32)
    monkeypatch.setattr(exponentials.plgpu, "elementwise_inline_asm", run_ptx)
    expected = np.exp2(np.float64(factor) * np.asarray(x, np.float64) - np.asarray(shift, np.float64))
    for interpreted in (True, False):
        found = exponentials.exp2(x, float(factor), shift, interpreted)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("factor", [0.1803368801, 1.4426950408889634])
def test_what_is_masked_has_no_weight_and_masks_alone_do_not_overflow(factor, monkeypatch):
    monkeypatch.setattr(exponentials.plgpu, "elementwise_inline_asm", run_ptx)
    masked = jnp.full((1, 4), exponentials.MASKED, jnp.float32)
    for interpreted in (True, False):
        assert not exponentials.exp2(masked, factor, jnp.zeros((1, 1)), interpreted).any()
        assert not exponentials.exp2(jnp.ones((1, 4)), factor, jnp.full((1, 1), jnp.inf), interpreted).any()
        top = jnp.full((1, 1), exponentials.MASKED * factor, jnp.float32)
        np.testing.assert_array_equal(exponentials.exp2(masked, factor, top, interpreted), 1.0)


def test_its_tanh_is_one(monkeypatch):
    monkeypatch.setattr(exponentials.plgpu, "elementwise_inline_asm", run_ptx)
    x = jnp.asarray([-500.0, -60.0, -3.0, -0.7, -1e-4, 0.0, 1e-3, 0.2, 5.0, 40.0, 500.0], jnp.float32)
    for interpreted in (True, False):
        found = exponentials.tanh(jnp.bfloat16, interpreted)(x)
        np.testing.assert_allclose(found, np.tanh(np.asarray(x, np.float64)), rtol=0, atol=3e-7)
    assert exponentials.tanh(jnp.float32, interpreted=False) is jnp.tanh
