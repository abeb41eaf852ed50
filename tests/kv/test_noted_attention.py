"""Attention and how much of it each key got, from one computation of the logits, against plain loops in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.partial import Partial
from streamjax.kv import Cascade, Pages, Representative, Sink, Window
from streamjax.kv.noted_attention import attend_and_note
from streamjax.kv.query import KVTokens, Query, Stored
from tests.kv.tier_streams import FREQUENCIES, run, wandering

ROWS, HEADS, GROUP, WIDTH, CHUNK, SLOTS = 2, 2, 2, 6, 10, 12
FILLED, NEW, REACH = (5, 12), (10, 7), 9


@pytest.mark.parametrize("used", [0, 12])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.25, 0.125, 1.0)])
def test_it_is_the_softmax_over_all_and_the_sums_of_its_shares(monkeypatch, slopes, used):
    monkeypatch.setattr("streamjax.kv.noted_attention.QUERIES", 4)  # of 10, so that the last run is padded
    random = np.random.default_rng(0)
    held = np.minimum(FILLED, used)
    k, v = random.standard_normal((2, ROWS, HEADS, SLOTS, WIDTH))
    own_k, own_v = random.standard_normal((2, ROWS, HEADS, CHUNK, WIDTH))
    q = random.standard_normal((ROWS, CHUNK, HEADS * GROUP, WIDTH))
    others = random.standard_normal((ROWS, CHUNK, HEADS * GROUP, WIDTH)), random.standard_normal((ROWS, CHUNK, 4))
    first = np.array([100, 2**32 - 3])  # positions wrap within the second row's chunk
    place = ((first - held)[:, None] + np.arange(SLOTS)) % 2**32
    position = (first[:, None] + np.arange(CHUNK)) % 2**32
    new = np.arange(CHUNK) < np.array(NEW)[:, None]

    expected, notes = [np.array(x) for x in others], np.zeros((ROWS, HEADS * GROUP, SLOTS + CHUNK))
    for row in range(ROWS):
        keys, values = (np.concatenate(x, axis=1) for x in ((k[row], own_k[row]), (v[row], own_v[row])))
        back = np.arange(CHUNK)[:, None] - np.concatenate((np.arange(SLOTS) - held[row], np.arange(CHUNK)))
        there = np.concatenate((np.arange(SLOTS) < held[row], new[row]))
        for i, head in np.ndindex(NEW[row], HEADS * GROUP):
            logits = 0.3 * keys[head // GROUP] @ q[row, i, head] - (slopes[head] * back[i] if slopes else 0)
            weights = np.where(there & (back[i] >= 0) & (back[i] <= REACH), np.exp(logits), 0)
            rest = np.exp(others[1][row, i, head])
            whole = weights.sum() + rest
            expected[0][row, i, head] = (weights @ values[head // GROUP] + rest * others[0][row, i, head]) / whole
            expected[1][row, i, head] = np.log(whole)
            notes[row, head] += weights / whole

    def single(*arrays):
        return [jnp.asarray(x, jnp.float32) for x in arrays]

    asked = Query(
        *single(q, q), jnp.asarray(position, jnp.uint32), jnp.asarray(held, jnp.int32),
        None if slopes is None else jnp.array(slopes), None, 0.3, None, valid=jnp.asarray(new),
    )  # fmt: skip
    stored = Stored(
        *single(k, v), jnp.asarray(place[:, None], jnp.uint32), jnp.asarray(np.arange(SLOTS) < held[:, None])[:, None]
    )
    own = KVTokens(*single(own_k, own_v, own_k), jnp.asarray(position[:, None], jnp.uint32), jnp.asarray(new[:, None]))
    whole, mass, mine = attend_and_note(
        asked, stored, own, Partial(*single(*others)), REACH, jnp.asarray(held, jnp.int32)
    )
    for found, wanted in zip(whole, expected, strict=True):
        np.testing.assert_allclose(np.asarray(found)[new], wanted[new], atol=3e-6)
    np.testing.assert_allclose(np.concatenate((mass, mine), axis=2), notes, atol=3e-6)


@pytest.mark.slow  # two programs of a whole cascade: 4 CPU seconds
def test_a_cascade_that_notes_while_it_reads_is_the_one_that_computes_logits_again(monkeypatch):
    """As the way with a reverse mode does. With sinks' logits, padded rows, and pages chosen by what was noted."""
    for module in ("cascade", "noted_attention"):
        monkeypatch.setattr(f"streamjax.kv.{module}.QUERIES", 4)
    cache = Cascade(Sink(2, reach=7), Window(7), Pages(3, 24, 2, Representative(1), distance=7))
    options = {"frequencies": FREQUENCIES, "sink_logits": (0.1, -0.2, 0.3, 0.0)}
    stream, _ = wandering(length=40, seed=3)
    counts = [(11, 5), (9, 11)]
    found, state = run(cache, stream, counts, width=11, **options)
    expected, again = run(cache, stream, counts, width=11, differentiable=True, **options)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    for notes, wanted in ((state[1].score, again[1].score), (state[2].tokens.score, again[2].tokens.score)):
        np.testing.assert_allclose(notes, wanted, atol=3e-6)
