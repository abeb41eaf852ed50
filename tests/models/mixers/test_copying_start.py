"""Mamba-2 that begins by copying (2410.11135): what came behind the token that is read, when that came before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.models.config import SSDConfig
from streamjax.models.mixers.ssd import SSD

WIDTH, LENGTH, FIRST, AGAIN = 48, 20, 4, 15


def effects(config, seed):
    """How much what the heads read at AGAIN, where the token of FIRST comes again, moves with each token before."""
    key, key_x = jax.random.split(jax.random.key(seed))
    mixer = SSD(config, WIDTH, key, jnp.dtype("float32"))
    x = jax.random.normal(key_x, (LENGTH, WIDTH))
    x = x.at[AGAIN].set(x[FIRST])

    def read(x):
        return mixer.recur(x[None], mixer.empty(1, x.dtype))[0][0, AGAIN, WIDTH:]

    return np.linalg.norm(np.asarray(jax.jit(jax.jacobian(read))(x)), axis=(0, 2))


@pytest.mark.parametrize("seed", range(2))
def test_a_new_layer_reads_what_came_behind_the_same_token(seed):
    """Of tokens that the convolution at AGAIN does not see, that behind FIRST moves it most; FIRST is the key."""
    config = SSDConfig(4, 1, head_dim=32, state_dim=64, hands_on=True, copies=True)
    moved = effects(config, seed)[: AGAIN - config.conv_width + 1]
    others = np.delete(moved, [FIRST, FIRST + 1])
    assert moved[FIRST + 1] > 1.5 * others.max()


def test_it_hardly_forgets_within_the_training_length():
    config = SSDConfig(4, 2, head_dim=8, state_dim=4, copies=True)
    mixer = SSD(config, WIDTH, jax.random.key(0), jnp.dtype("float32"))
    decay = np.exp(-np.exp(np.asarray(mixer.rate_log[...])) * np.log1p(np.exp(np.asarray(mixer.step_bias[...]))))
    assert (decay**256 > 0.05).all()
    np.testing.assert_allclose(decay[[0, -1]], [np.exp(-1e-4), np.exp(-1e-2)], rtol=1e-6)
    inside = np.asarray(mixer.inside[...])
    np.testing.assert_array_equal(inside[..., 16:20], inside[..., 20:24])
    assert (inside[:, 0, 16:20] != inside[:, 1, 16:20]).any()


def test_it_needs_a_convolution():
    with pytest.raises(ValueError, match=r"SSDConfig\.copies needs a convolution that reads the token before"):
        SSDConfig(4, 1, head_dim=8, state_dim=4, conv_width=1, copies=True)
