"""Recurrences over matrix states by both platforms' kernels, interpreted: outputs, states and all gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import api, argument_checks, reference
from pallas_kernels.api import platforms
from streamjax.attention import recurrent

INTERPRETERS = {"tpu": pltpu.InterpretParams(detect_races=True), "triton": True}
RULES = {  # the delta rule, decays of channels, groups, heads of a group, rows and columns of a state
    "mamba-2": (False, False, 1, 8, 16, 16),
    "gla": (False, True, 2, 1, 16, 32),
    "gated-delta": (True, False, 4, 2, 16, 32),
    "kda": (True, True, 4, 1, 16, 16),
}
TOKENS, BLOCK = 40, 16  # the last block is not full


def drawn(rule, tokens=TOKENS):
    delta, channels, groups, shared, keys, width = RULES[rule]
    random = np.random.default_rng(0)
    heads = 2, tokens, groups, shared
    q, k = random.normal(size=(2, *heads[:3], keys))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = random.normal(size=(*heads, width)), random.normal(size=(2, groups, shared, keys, width))
    decay = -random.exponential(0.2, size=(*heads, keys) if channels else heads)
    decay = np.where(random.uniform(size=decay.shape) < 0.05, 2000.0 * decay, decay)  # some forget all
    beta = random.uniform(size=heads) if delta else None
    resets = np.zeros((2, tokens), bool)
    resets[0, [5, 16, 17]] = True
    return (q, k, v, decay, state), {"beta": beta}, resets


def both(call, given, known):
    """Outputs, and the gradients of something of them."""
    inside = [name for name, x in known.items() if x is not None and x.dtype != bool]

    def run(given, floats):
        return call(*given, **{**known, **floats})

    found, pull = jax.vjp(run, given, {name: known[name] for name in inside})
    return found, pull(jax.tree.map(lambda x: jnp.cos(3 * x.astype(jnp.float32)).astype(x.dtype), found))


@cache
def exact(rule):
    given, known, resets = drawn(rule)
    with jax.enable_x64(True):
        resets = jnp.asarray(resets)
        wide = jax.tree.map(jnp.asarray, (given, known))
        return jax.tree.map(
            np.asarray, jax.jit(lambda g, k: both(reference.chunkwise_recurrence, g, {**k, "resets": resets}))(*wide)
        )


def interpreted(implementation):
    def call(*arrays, **known):
        return api.chunkwise_recurrence(
            *arrays, **known, block=BLOCK, implementation=implementation, interpret=INTERPRETERS[implementation]
        )

    return call


def off(found, right):
    """The greatest error of all arrays, each relative to the greatest number of what it should be."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    return max(np.abs(mine - x).max() / max(1.0, np.abs(x).max()) for mine, x in pairs)


@pytest.mark.weekly("tpu-mamba-2", "tpu-gated-delta", "triton-kda")
@pytest.mark.parametrize("rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule == "gla")) for rule in RULES])
@pytest.mark.parametrize("implementation", INTERPRETERS)
def test_outputs_states_and_gradients_are_those_of_the_rule(implementation, rule, monkeypatch):
    """On TPUs with several steps a block, of one group or of several."""
    monkeypatch.setattr("pallas_kernels.tpu.recurrence.chunkwise.HEADS", 4)
    given, known, resets = drawn(rule)
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), (given, known))
    run = jax.jit(
        lambda given, known: both(interpreted(implementation), given, {**known, "resets": jnp.asarray(resets)})
    )
    assert off(run(*narrow), exact(rule)) < 1e-5


@pytest.mark.parametrize("rule", ["mamba-2", pytest.param("kda", marks=pytest.mark.slow)])
def test_the_recurrence_takes_the_kernels(rule, monkeypatch):
    """As on a GPU: the outputs, states and gradients of the form that runs anywhere, with rows of different lengths."""
    (q, k, v, decay, state), known, resets = drawn(rule, tokens=70)
    arrays = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (q, k, v, decay, state.reshape(2, -1, *state.shape[3:]))
    )
    beta = {name: x if x is None else jnp.asarray(x, jnp.float32) for name, x in known.items()}
    valid = jnp.arange(70) < jnp.asarray([[70], [33]])
    rest = {"valid": valid, "resets": jnp.asarray(resets)}

    def run(*arrays, **known):
        out, state = recurrent.recurrence(*arrays, **known)
        return jnp.where(valid[:, :, None, None, None], out, 0.0), state

    expected, called, right = (
        jax.jit(lambda a, b: both(run, a, {**b, **rest}))(arrays, beta),
        [],
        api.chunkwise_recurrence,
    )

    def by_kernel(*arrays, **known):
        called.append(1)
        return right(*arrays, **known, implementation="triton", interpret=True)

    monkeypatch.setattr(platforms, "platform_implementation", lambda: "triton")
    monkeypatch.setattr(api, "chunkwise_recurrence", by_kernel)
    found = jax.jit(lambda a, b: both(run, a, {**b, **rest}))(arrays, beta)
    assert called
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("implementation", INTERPRETERS)
def test_bfloat16_is_rounded_and_states_are_not(implementation):
    given, known, _ = drawn("gated-delta")
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in given[:3]] + [jnp.asarray(x, jnp.float32) for x in given[3:]]
    beta = jnp.asarray(known["beta"], jnp.float32)
    out, state = interpreted(implementation)(*arrays, beta=beta)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    right = reference.chunkwise_recurrence(*(x.astype(jnp.float32) for x in arrays), beta=beta)
    assert off((out.astype(jnp.float32), state), right) < 1e-2


def test_bad_arguments_are_refused_in_one_line():
    arrays = [jnp.asarray(x, jnp.float32) for x in drawn("gated-delta")[0]]
    q, k, v, decay, state = arrays
    for changed, message in (
        ({"k": k[:, :1]}, r"shapes .*k \(2, 1, 4, 16\).*: use twice \[B, T, G, K\]"),
        ({"resets": jnp.zeros((2, 3), bool)}, r"shapes .*resets \(2, 3\)"),
        ({"v": v.astype(jnp.bfloat16)}, "dtypes q float32, k float32, v bfloat16: use bfloat16 or"),
        ({"state": state.astype(jnp.bfloat16)}, "dtype state bfloat16: use float32"),
        ({"block": 48}, "blocks of 48 tokens: use a power of two"),
    ):
        plain = {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": decay,
            "beta": None,
            "state": state,
            "resets": None,
            "block": None,
        }
        with pytest.raises(ValueError, match=message) as caught:
            argument_checks.chunkwise(**{**plain, **changed})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no kernel of recurrences for cpu"):
        api.chunkwise_recurrence(*arrays)
