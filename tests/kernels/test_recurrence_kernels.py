"""One token of the delta rule by both platforms' kernels, interpreted, against float64; and inside the recurrence."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import aot
from benchmarks.kernels import state_updates
from pallas_kernels import api, argument_checks, reference
from pallas_kernels.api import platforms
from streamjax.attention import recurrent

INTERPRETERS = {"tpu": pltpu.InterpretParams(detect_races=True), "triton": True}
SHAPE = 2, 4, 2, 16, 32  # rows, groups, heads of a group, rows and columns of a state


def drawn(seed=0):
    random = np.random.default_rng(seed)
    batch, groups, shared, keys, width = SHAPE
    q, k = random.normal(size=(2, batch, groups, keys))
    v, state = random.normal(size=(batch, groups, shared, width)), random.normal(size=SHAPE)
    decay, beta = random.uniform(size=(batch, groups, shared, keys)), random.uniform(size=(batch, groups, shared))
    decay[0, 0] = 0.0  # a stream's first token
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k / 4, v, decay, beta, state))


def plain(q, k, v, decay, beta, state):
    """Head by head in float64."""
    q, k, v, decay, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, decay, beta, state))
    out, new = np.zeros(v.shape), np.zeros(state.shape)
    for b, g, r in np.ndindex(*state.shape[:3]):
        held = decay[b, g, r][:, None] * state[b, g, r]
        new[b, g, r] = held + np.outer(k[b, g], beta[b, g, r] * (v[b, g, r] - held.T @ k[b, g]))
        out[b, g, r] = new[b, g, r].T @ q[b, g]
    return out, new


@pytest.mark.parametrize("implementation", INTERPRETERS)
def test_a_token_is_that_of_the_rule(implementation, monkeypatch):
    """With some groups in a program, and so several programs a row."""
    monkeypatch.setattr("pallas_kernels.tpu.recurrence.delta_update.BLOCK", 2 * 2 * 16 * 32 * 4)
    arrays = drawn()
    found = api.delta_update(*arrays, implementation=implementation, interpret=INTERPRETERS[implementation])
    for mine, other, exact in zip(found, reference.delta_update(*arrays), plain(*arrays), strict=True):
        np.testing.assert_allclose(mine, exact, atol=2e-5)
        np.testing.assert_allclose(other, exact, atol=2e-5)


@pytest.mark.parametrize("channels", [False, True])
def test_the_recurrence_takes_the_kernel(channels, monkeypatch):
    """As on a GPU: the outputs, states and gradients of the form that runs anywhere."""
    q, k, v, decay, beta, state = drawn(1)
    decay = jnp.log(0.5 + decay / 2) if channels else jnp.log(0.5 + decay[..., 0] / 2)
    tokens = q[:, None], k[:, None], v[:, None], decay[:, None]

    def run(tokens, state):
        return recurrent.recurrence(*tokens, state.reshape(2, 8, 16, 32), beta=beta[:, None])

    def both(tokens, state):
        out, vjp = jax.vjp(run, tokens, state)
        return out, vjp(jax.tree.map(jnp.cos, out))

    expected, called, right = jax.jit(both)(tokens, state), [], api.delta_update

    def interpreted(*arrays):
        called.append(1)
        return right(*arrays, implementation="triton", interpret=True)

    monkeypatch.setattr(platforms, "platform_implementation", lambda: "triton")
    monkeypatch.setattr(api, "delta_update", interpreted)
    found = jax.jit(lambda *given: both(*given))(tokens, state)
    assert called
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, atol=2e-5), found, expected)


def test_what_adds_is_one_sum_on_accelerators(monkeypatch):
    q, k, v, decay, _, state = drawn(2)
    given = q[:, None], k[:, None], v[:, None], jnp.log(0.5 + decay / 2)[:, None], state.reshape(2, 8, 16, 32)
    expected = recurrent.recurrence(*given)
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    jax.tree.map(
        lambda mine, other: np.testing.assert_allclose(mine, other, atol=2e-5), recurrent.recurrence(*given), expected
    )


def test_bad_arguments_are_refused_in_one_line():
    q, k, v, decay, beta, state = drawn()
    for given, message in (
        ((q, k[:, :1], v, decay, beta, state), r"shapes .*k \(2, 1, 16\).*: use twice \[B, G, K\]"),
        ((q, k, v, decay, beta, state[0]), "shapes .*state"),
        ((q.astype(np.float16), k, v, decay, beta, state), "dtype float16: delta_update takes float32"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            argument_checks.delta_update(*given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no kernel of the delta rule for cpu"):
        api.delta_update(q, k, v, decay, beta, state)


COMPILE = (
    "import sys; from benchmarks.kernels import state_updates as s; print({call}(sys.argv[1], sys.argv[2], 'as used'))"
)


def compiled(topology, call, chip, model):
    command = [sys.executable, "-c", COMPILE.format(call=call), chip, model]
    return subprocess.run(
        command, env=aot.child_environment(topology), cwd=aot.ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", state_updates.MODELS)
@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
def test_a_tpu_moves_every_state_in_and_out_once(model):
    assert 2 <= float(compiled("v5e:1x1", "s.moved", "v5e", model)) < 2.1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Qwen3-Next 80B", "Kimi-Linear 48B"])
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
def test_an_h100_takes_the_kernel(model):
    text = compiled("h100", "s.program", "h100", model)
    assert text.count("custom_call_target") == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", state_updates.MODELS)
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
def test_an_h100_moves_every_state_in_and_out_once(model):
    assert 2 <= float(compiled("h100", "s.moved", "h100", model)) < 2.1
