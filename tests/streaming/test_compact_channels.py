"""Prompts that are laid out anew by tiers that keep fewer channels, against the rules in loops."""

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.mixers.attention import SequenceContext
from tests.oracles import channels
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

LENGTH, QUERIES = 48, 6


@pytest.fixture(scope="module")
def prompt():
    """A model, two prompts that it has read into a dense cache, and of each layer queries, keys and values."""
    model, tokens = build(GQA), random_tokens(2, LENGTH)
    state = sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=64), batch_size=2), tokens, 16)
    x, context, found = model.embed(jnp.asarray(tokens)), SequenceContext.from_start(2, LENGTH), []
    for i in range(model.config.num_layers):
        found.append([np.asarray(part, np.float64) for part in model.layer(i).project(x, context)])
        x, _ = model.layer(i).parallel(x, context)
    return model, tokens, state, found


def test_a_prompt_loses_channels_by_its_last_queries(prompt):
    """ThinK as published, a group at a time, as kvpress does it too: by the squares of queries times those of keys."""
    model, tokens, state, found = prompt
    cache = sj.kv.preset("think", keep=0.5, window=QUERIES, group=16, queries=16, capacity=64)
    new = sj.compact(model, state, cache, tokens[:, -QUERIES:])
    for (q, k, _), (_, layer) in zip(found, new.layers, strict=True):
        for row in range(2):
            expected = channels.pruned(k[row, : LENGTH - QUERIES], q[row, -QUERIES:], 3, 16)
            kept = np.asarray(layer.slots.k.dense())[row, :, : LENGTH - QUERIES].swapaxes(0, 1)
            np.testing.assert_allclose(kept, expected, atol=1e-5)
    _, logits = read_stream(model, new, random_tokens(2, 16, seed=1), [1])
    assert np.isfinite(logits).all()
