"""Recurrences of single channels, in blocks and one token at a time, against token-by-token float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.elementwise_recurrence import elementwise_recurrence

ROWS, LENGTH, GROUPS, CHANNELS = 2, 23, 2, 3
read = jax.jit(elementwise_recurrence, static_argnames="block")


def inputs(strength=0.3, seed=0, length=LENGTH):
    random = np.random.default_rng(seed)
    x, decay = random.standard_normal((2, ROWS, length, GROUPS, CHANNELS)).astype(np.float32)
    state = random.standard_normal((ROWS, GROUPS, CHANNELS)).astype(np.float32)
    return x, -strength * np.abs(decay), state


def token_by_token(x, log_decay, state, resets=None):
    state, out = np.asarray(state, np.float64), np.zeros(x.shape)
    for t in range(x.shape[1]):
        if resets is not None:
            state = np.where(resets[:, t, None, None], 0.0, state)
        out[:, t] = state = np.exp(log_decay[:, t].astype(np.float64)) * state + x[:, t]
    return out, state


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.05, 200.0])
def test_is_the_recurrence(strength):
    """Whole blocks and a part of one; decays that are weak, and so strong that they are 0; documents."""
    given = inputs(strength)
    close(read(*given, block=8), token_by_token(*given))
    resets = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.2
    close(read(*given, resets=resets, block=8), token_by_token(*given, resets))


def test_any_cut_gives_the_same():
    x, decay, first = inputs()
    state, outputs, start = first, [], 0
    for size in (7, 1, 7, 1, 7):
        out, state = read(x[:, start : start + size], decay[:, start : start + size], state)
        outputs.append(out)
        start += size
    close((np.concatenate(outputs, axis=1), state), token_by_token(x, decay, first))


def test_rows_without_tokens_keep_their_state():
    x, decay, state = inputs()
    state[0, 0, 0] = -0.0
    valid = np.arange(LENGTH) < np.array([0, 5])[:, None]
    _, new = read(x, decay, state, valid=valid)
    assert np.asarray(new)[0].tobytes() == state[0].tobytes()
    close([new[1:]], [token_by_token(x[1:, :5], decay[1:, :5], state[1:])[1]])


def test_decays_that_vanish_have_a_gradient():
    x, _, state = inputs()
    for decay in (0.0, -1e4):
        grads = jax.grad(lambda *a: jnp.sum(read(*a, block=8)[0]), (0, 1, 2))(x, np.full_like(x, decay), state)
        assert all(np.isfinite(grad).all() for grad in grads)
