"""Causal work is not paid twice: which blocks of attention both orders of chunked backprop visit."""

from functools import partial

import jax
import numpy as np
import pytest

from streamjax.attention import blockwise
from tests.training.gradient_checks import CONFIG, ORDERS, gradient, random_batch, random_model

PASSES = {"layer": 3, "chunk": 4}  # over the one layer: forwards, once or twice again, backwards


@pytest.mark.covering
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (20, 0), (6, 0), (11, 2), (6, 9)], ids=lambda x: "all" if x is None else str(x)
)
def test_visits_only_blocks_that_the_pattern_needs(order, window, sinks, monkeypatch):
    """Every visible pair once a pass, and no block without one: loops stop at the diagonal and start at the window."""
    length, chunk = 64, 16
    config = CONFIG.replace(num_layers=1, windows=(window,), sinks=sinks)
    visited = []
    original = blockwise._logits

    def record(block_q, first, index, held):
        keys = np.where(np.asarray(held), np.asarray(index), -1)[0]
        visited.append((int(first) + np.arange(block_q), keys))

    def counting(blocks, queries, keys, i, j):
        first = queries.offset + i * blocks.block_q
        jax.debug.callback(partial(record, blocks.block_q), first, *blockwise._key_index(blocks, keys, j))
        return original(blocks, queries, keys, i, j)

    monkeypatch.setattr(blockwise, "_logits", counting)
    model, batch = random_model(config, "float32"), random_batch(config.vocab_size, 1, length)
    jax.block_until_ready(gradient(model, batch, order, chunk_size=chunk))
    jax.effects_barrier()

    t, s = np.arange(length)[:, None], np.arange(length)[None]
    needed = (s <= t) & (s > t - (window or length))
    needed |= (s <= t) & (s < sinks)
    seen = np.zeros((length, length), int)
    for queries, keys in visited:
        here = keys[keys >= 0]
        assert needed[np.ix_(queries, here)].any(), f"queries {queries}, keys {keys}"
        seen[np.ix_(queries, here)] += 1
    np.testing.assert_array_equal(seen[needed], PASSES[order])
