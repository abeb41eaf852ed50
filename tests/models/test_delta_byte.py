"""The shipped model in InfiniteVL's shape reads many times the length of its rows, and is as good as before."""

import argparse
import inspect
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj

FOLDER = Path(__file__).parents[2] / "models" / "delta_byte"
ROW, PROBE = 256, 1024  # bytes of a row of its training, and bytes that are compared


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_perplexity_is_flat_in_length(times):
    """Of the same bytes behind so many rows and behind one: the ratio is at most 1.02."""
    model = sj.load(FOLDER, jnp.float32)
    text = np.frombuffer(inspect.getsource(argparse).encode()[: times * ROW + PROBE], np.uint8).astype(np.int32)
    assert model.config.max_position == ROW
    assert len(text) == times * ROW + PROBE

    def nats(tokens: np.ndarray) -> float:
        state = sj.init_state(model, sj.kv.preset("window"))
        assert state.cache_bytes < 200_000
        _, found = sj.score(model, state, tokens[None], ROW)
        return float(np.mean(np.asarray(found)[0, -PROBE:], dtype=np.float64))

    far, near = nats(text), nats(text[-PROBE - ROW :])
    assert near < 3.0  # it has learnt: log(259) is 5.6
    assert np.exp(far - near) <= 1.02
