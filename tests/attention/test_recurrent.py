"""Recurrences over a matrix state, in blocks and one token at a time, against token-by-token float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.recurrent import recurrence
from tests.oracles import recurrent as oracle

ROWS, LENGTH, GROUPS, SHARED, KEY, VALUE = 2, 70, 2, 2, 4, 3
KINDS = [(delta, channels) for delta in (False, True) for channels in (False, True)]
read = jax.jit(recurrence, static_argnames="block")


def inputs(delta, channels, strength=0.3, seed=0, length=LENGTH):
    """Float32 arrays by the names of the arguments; keys of the delta rule have length 1."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal((ROWS, length, GROUPS, *shape)).astype(np.float32)

    q, k, v = draw(KEY), draw(KEY), draw(SHARED, VALUE)
    decay = -strength * np.abs(draw(SHARED, KEY) if channels else draw(SHARED))
    state = random.standard_normal((ROWS, GROUPS * SHARED, KEY, VALUE)).astype(np.float32)
    found = {"q": q, "k": k, "v": v, "log_decay": decay, "state": state}
    if delta:
        found["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
        found["beta"] = 1 / (1 + np.exp(-draw(SHARED)))
    return found


def close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("delta", "channels"), KINDS)
@pytest.mark.parametrize("strength", [0.05, 60.0])
def test_is_the_recurrence(delta, channels, strength):
    """Whole blocks and a part of one, with decays that are weak, and so strong that their inverse overflows."""
    given = inputs(delta, channels, strength)
    close(read(**given), oracle.recurrence(**given))


@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_a_token_that_forgets_all_costs_the_others_no_digits(delta, channels):
    """Some decays are e^-400: sums over a block are large then, and what others weigh must not be rounded so."""
    given = inputs(delta, channels)
    forget = np.random.default_rng(2).random(given["log_decay"].shape) < 0.05
    given["log_decay"] = np.where(forget, np.float32(-400), given["log_decay"])
    for found, right in zip(read(**given), oracle.recurrence(**given), strict=True):
        assert np.abs(found - right).max() < 4e-6 * np.abs(right).max()


@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_documents_begin_with_an_empty_state(delta, channels):
    given = inputs(delta, channels)
    resets = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.1
    close(read(**given, resets=resets), oracle.recurrence(**given, resets=resets))


@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_any_cut_gives_the_same(delta, channels):
    """Pieces of 7 and single tokens, each behind the state that the one before it left."""
    given = inputs(delta, channels, length=23)
    state, outputs, start = given["state"], [], 0
    arrays = {name: x for name, x in given.items() if name != "state"}
    for size in (7, 1, 7, 7, 1):
        piece = {name: x[:, start : start + size] for name, x in arrays.items()}
        out, state = read(**piece, state=state)
        outputs.append(out)
        start += size
    close((np.concatenate(outputs, 1), state), oracle.recurrence(**given))


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_padding_changes_no_state(delta, channels, length):
    """The first row has a part of its tokens, the second none: its state stays bit for bit, zeros with a sign too."""
    given = inputs(delta, channels, length=length)
    given["state"][1, 0, 0, 0] = -0.0
    count = np.array([(length + 1) // 2, 0])
    out, state = read(**given, valid=np.arange(length) < count[:, None])
    first = {name: x[:1] if name == "state" else x[:1, : count[0]] for name, x in given.items()}
    close((out[:1, : count[0]], state[:1]), oracle.recurrence(**first))
    assert np.asarray(state[1]).tobytes() == given["state"][1].tobytes()


@pytest.mark.covering
@pytest.mark.parametrize(("delta", "channels"), KINDS)
def test_gradients_are_those_of_single_tokens(delta, channels):
    """In float64, through blocks with resets, of decays that underflow too."""
    with jax.enable_x64(True):
        given = {name: jnp.asarray(x, jnp.float64) for name, x in inputs(delta, channels, 40.0, length=19).items()}
        resets = np.zeros((ROWS, 19), bool)
        resets[0, [3, 11]] = True

        def total(block, given):
            out, state = recurrence(**given, resets=jnp.asarray(resets), block=block)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        def by_token(given):
            def one(state, token):
                *arrays, reset = (x[:, None] for x in token)
                names = [name for name in given if name != "state"]
                out, state = recurrence(**dict(zip(names, arrays, strict=True)), state=state, resets=reset)
                return state, out

            tokens = [jnp.swapaxes(x, 0, 1) for name, x in given.items() if name != "state"]
            state, out = jax.lax.scan(one, given["state"], (*tokens, resets.T))
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        found, expected = jax.jit(jax.grad(partial(total, 8)))(given), jax.jit(jax.grad(by_token))(given)
        for name in given:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-11, rtol=1e-9, err_msg=name)
