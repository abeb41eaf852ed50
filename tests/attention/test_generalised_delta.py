"""RWKV-7's recurrence in blocks and by the token, against token-by-token float64."""

import jax
import numpy as np
import pytest

from streamjax.attention.generalised_delta import generalised_delta
from streamjax.attention.recurrent import recurrence
from tests.oracles import recurrent as oracle

ROWS, LENGTH, HEADS, KEY, VALUE = 2, 39, 2, 4, 3
read = jax.jit(generalised_delta, static_argnames="block")


def inputs(strength=0.6, seed=0):
    """Float32 arrays by the names of the arguments; what is erased is bounded, as it is in the model."""
    random = np.random.default_rng(seed)

    def draw(width):
        return random.standard_normal((ROWS, LENGTH, HEADS, width)).astype(np.float32)

    erase = draw(KEY)
    erase /= np.linalg.norm(erase, axis=-1, keepdims=True)
    write = -erase / (1 + np.exp(-draw(KEY)))
    decay = -strength * np.abs(draw(KEY))
    state = random.standard_normal((ROWS, HEADS, KEY, VALUE)).astype(np.float32)
    return {"q": draw(KEY), "k": draw(KEY), "v": draw(VALUE), "erase": erase, "write": write, "log_decay": decay,
            "state": state}  # fmt: skip


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.6, 60.0])
def test_is_the_recurrence(strength):
    """Documents too, and decays so strong that their inverse overflows."""
    given = inputs(strength)
    close(read(**given), oracle.generalised_delta(**given))
    resets = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.1
    close(read(**given, resets=resets), oracle.generalised_delta(**given, resets=resets))


def test_any_cut_gives_the_same_and_rows_have_counts_of_their_own():
    given = inputs()
    arrays, state = {name: x for name, x in given.items() if name != "state"}, given["state"]
    outputs, start = [], 0
    for width in (16, 1, 16, 1, 1, 1, 1, 1, 1):
        out, state = read(**{name: x[:, start : start + width] for name, x in arrays.items()}, state=state)
        outputs.append(out)
        start += width
    assert start == LENGTH
    close((np.concatenate(outputs, axis=1), state), read(**given))
    valid = np.arange(LENGTH) < np.array([[0], [17]])
    out, state = read(**given, valid=valid)
    assert np.asarray(state)[0].tobytes() == given["state"][0].tobytes()
    short = {name: x[1:, :17] for name, x in arrays.items()}
    close((out[1:, :17], state[1:]), oracle.generalised_delta(**short, state=given["state"][1:]))


def test_the_delta_rule_is_a_case_of_it():
    given = inputs()
    beta = 1 / (1 + np.exp(-given["v"][..., :1]))
    k = given["erase"]
    expected = jax.jit(recurrence)(
        given["q"], k, given["v"][..., None, :], given["log_decay"][..., None, :], given["state"], beta=beta
    )
    decayed = np.exp(given["log_decay"])  # that rule reads the state behind its decay
    given |= {"k": beta * k, "erase": k * decayed, "write": -beta * k}
    out, state = read(**given)
    close((out[..., None, :], state), expected)
