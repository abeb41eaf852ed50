"""Recurrences beside flash-linear-attention's own plain ones (fla-core 0.6.0), in float64.

Its package cannot be imported without Triton, so the files with the plain rules, which need PyTorch alone, are loaded
from where it is installed: `pip install --no-deps fla-core`. HGRN2 is its gated linear attention with keys that are 1
minus the decay, RWKV-7 its delta rule with a diagonal and a low rank.
"""

import importlib.util
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.elementwise_recurrence import elementwise_recurrence
from streamjax.attention.generalised_delta import generalised_delta
from streamjax.attention.recurrent import recurrence

torch = pytest.importorskip("torch")
FLA = importlib.util.find_spec("fla")
pytestmark = pytest.mark.skipif(FLA is None, reason="fla-core is not installed")
ROWS, LENGTH, HEADS, KEY, VALUE = 2, 37, 3, 8, 6


class Double:
    """PyTorch, in which the float32 that the plain rules ask for is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def theirs(path, name, *arrays, **options):
    """What a function of theirs makes of NumPy arrays."""
    file = Path(FLA.origin).parent / "ops" / path / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = Double()

    def given(x):
        return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        found = getattr(module, name)(*map(given, arrays), **{key: given(x) for key, x in options.items()})
    assert all(x.dtype == torch.float64 for x in found)
    return tuple(x.numpy() for x in found)


def drawn(seed=0):
    """Queries, keys of length 1, values, decays of channels, write strengths, and a state."""
    random = np.random.default_rng(seed)
    q, k, decay = random.standard_normal((3, ROWS, LENGTH, HEADS, KEY))
    v = random.standard_normal((ROWS, LENGTH, HEADS, VALUE))
    beta = 1 / (1 + np.exp(-random.standard_normal((ROWS, LENGTH, HEADS))))
    state = random.standard_normal((ROWS, HEADS, KEY, VALUE))
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, -0.4 * np.abs(decay), beta, state


def ours(q, k, v, decay, state, beta=None):
    """In blocks, every head a group of its own."""
    with jax.enable_x64(True):
        known = None if beta is None else jnp.asarray(beta[..., None])
        arrays = q * KEY**-0.5, k, v[:, :, :, None], decay[:, :, :, None], state
        out, state = recurrence(*map(jnp.asarray, arrays), beta=known, block=16)
        return np.asarray(out[:, :, :, 0]), np.asarray(state)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-12)


def test_gated_linear_attention_and_hgrn2():
    q, k, v, decay, _, state = drawn()
    known = {"initial_state": state, "output_final_state": True}
    close(ours(q, k, v, decay, state), theirs("gla", "naive_recurrent_gla", q, k, v, decay, **known))
    keys = 1 - np.exp(decay)  # HGRN2's
    close(ours(q, keys, v, decay, state), theirs("gla", "naive_recurrent_gla", q, keys, v, decay, **known))


def test_one_decay_a_head():
    """What Mamba-2 is made of."""
    q, k, v, decay, _, state = drawn()
    known = {"initial_state": state, "output_final_state": True}
    decay = decay[..., 0]
    close(ours(q, k, v, decay, state), theirs("simple_gla", "naive_recurrent_simple_gla", q, k, v, decay, **known))


def test_delta_rules():
    q, k, v, decay, beta, state = drawn()
    known = {"initial_state": state, "output_final_state": True}
    heads_first = (np.swapaxes(x, 1, 2) for x in (q, k, v, beta))
    plain, last = theirs("delta_rule", "delta_rule_recurrence", *heads_first, **known)
    close(ours(q, k, v, 0 * decay[..., 0], state, beta), (np.swapaxes(plain, 1, 2), last))
    gated = theirs("gated_delta_rule", "naive_recurrent_gated_delta_rule", q, k, v, beta, decay[..., 0], **known)
    close(ours(q, k, v, decay[..., 0], state, beta), gated)
    channels = theirs("kda", "naive_recurrent_kda", q, k, v, decay, beta, **known)
    close(ours(q, k, v, decay, state, beta), channels)


def test_rwkv7():
    q, k, v, decay, beta, state = drawn()
    erase, write = -k, k * beta[..., None]
    keys = np.random.default_rng(1).standard_normal(k.shape)
    heads_first = (np.swapaxes(x, 1, 2) for x in (q, keys, v, erase, write, decay))
    known = {"initial_state": state, "output_final_state": True}
    out, last = theirs("generalized_delta_rule/dplr", "dplr_recurrence", *heads_first, **known)
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (q * KEY**-0.5, keys, v, erase, write, decay, state))
        found = tuple(map(np.asarray, generalised_delta(*arrays)))
    close(found, (np.swapaxes(out, 1, 2), last))


def test_hgrn():
    """Theirs has one channel after another, and no heads."""
    _, _, v, decay, _, state = drawn()
    x, gate, first = v[:, :, 0], decay[:, :, 0, :VALUE], state[:, 0, 0]
    expected = theirs("hgrn", "naive_recurrent_hgrn", x, gate, initial_state=first, output_final_state=True)
    with jax.enable_x64(True):
        out, last = elementwise_recurrence(
            *map(jnp.asarray, (x[:, :, None], gate[:, :, None], first[:, None])), block=8
        )
    close((np.asarray(out[:, :, 0]), np.asarray(last[:, 0])), expected)
