"""Leaky neurons against a plain loop, in pieces, with padding and documents, and their derivative."""

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.attention.spiking import leaky_spikes

ROWS, LENGTH, WIDTH = 3, 17, 6
read = jax.jit(leaky_spikes, static_argnames="threshold")


def oracle(x, state, resets, threshold):
    """Neuron by neuron, token by token, in float64."""
    spikes, state = np.zeros(x.shape), np.array(state, np.float64)
    for row, neuron in np.ndindex(x.shape[0], x.shape[2]):
        v = state[row, neuron]
        for t in range(x.shape[1]):
            v = 0.0 if resets[row, t] else v
            v = v / 2 + x[row, t, neuron] / 2
            if v >= threshold:
                spikes[row, t, neuron], v = 1, 0.0
        state[row, neuron] = v
    return spikes, state


def drawn():
    random = np.random.default_rng(0)
    x = (1 + 1.5 * random.standard_normal((ROWS, LENGTH, WIDTH))).astype(np.float32)
    return x, random.random((ROWS, WIDTH)).astype(np.float32), random.random((ROWS, LENGTH)) < 0.15


def test_spikes_are_those_of_a_loop_whole_and_in_pieces():
    x, state, resets = drawn()
    expected, last = oracle(x, state, resets, 0.7)
    assert 0.2 < expected.mean() < 0.7
    found, new = read(x, state, threshold=0.7, resets=resets)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(new, last, atol=1e-6)
    parts, old = [], state
    for start, stop in [(0, 1), (1, 8), (8, 17)]:
        part, old = read(x[:, start:stop], old, threshold=0.7, resets=resets[:, start:stop])
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    np.testing.assert_array_equal(old, new)


def test_padding_changes_no_potential():
    x, state, _ = drawn()
    count = np.array([LENGTH, 0, 5])
    found, new = read(x, state, valid=np.arange(LENGTH) < count[:, None])
    assert np.asarray(new[1]).tobytes() == state[1].tobytes()
    short, last = read(x[2:, :5], state[2:])
    np.testing.assert_array_equal(found[2, :5], short[0])
    np.testing.assert_array_equal(new[2], last[0])


def test_the_derivative_is_that_of_the_sigmoid_and_not_of_the_reset():
    """By the chain rule written out, neuron by neuron: firing counts, being emptied is a constant."""
    with jax.enable_x64(True):
        x, state, resets = (np.asarray(a, a.dtype if a.dtype == bool else np.float64) for a in drawn())
        weights = np.random.default_rng(1).standard_normal(x.shape)

        def total(x, state):
            spikes, last = leaky_spikes(x, state, resets=jnp.asarray(resets))
            return jnp.sum(spikes * weights) + jnp.sum(jnp.sin(last))

        found, of_state = jax.grad(total, argnums=(0, 1))(x, state)
    expected, first = np.zeros(x.shape), np.zeros(state.shape)
    for row, neuron in np.ndindex(ROWS, WIDTH):
        v, charged, fired = state[row, neuron], [], []
        for t in range(LENGTH):
            v = 0.0 if resets[row, t] else v
            charged.append((v + x[row, t, neuron]) / 2)
            fired.append(charged[-1] >= 1)
            v = 0.0 if fired[-1] else charged[-1]
        behind = np.cos(v)
        for t in reversed(range(LENGTH)):
            s = 1 / (1 + np.exp(-4 * (charged[t] - 1)))
            here = weights[row, t, neuron] * 4 * s * (1 - s) + behind * (not fired[t])
            expected[row, t, neuron] = here / 2
            behind = 0.0 if resets[row, t] else here / 2
        first[row, neuron] = behind
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(of_state, first, atol=1e-12)
