"""Prompts that are laid out anew by tiers that keep fewer channels, against the rules in loops."""

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.rope import make_rotary
from tests.oracles import channels
from tests.streaming.tiny_models import random_tokens, read_prompt, read_stream

LENGTH, QUERIES = 48, 6
THINK = sj.kv.preset("think", keep=0.5, window=QUERIES, group=16, queries=16, capacity=64)
SHADOWS = sj.kv.preset("shadow_kv", keys=0.5, window=8, page=4, top_k=3, outliers=2, group=20, capacity=80)


@pytest.fixture(scope="module")
def prompt():
    """A model, two prompts that it has read into a dense cache, and of each layer queries, keys and values."""
    return read_prompt(LENGTH)


def test_a_prompt_loses_channels_by_its_last_queries(prompt):
    """ThinK as published, a group at a time, as kvpress does it too: by the squares of queries times those of keys."""
    model, tokens, state, found = prompt
    new = sj.compact(model, state, THINK, tokens[:, -QUERIES:])
    for (q, k, _), (_, layer) in zip(found, new.layers, strict=True):
        for row in range(2):
            expected = channels.pruned(k[row, : LENGTH - QUERIES], q[row, -QUERIES:], 3, 16)
            kept = np.asarray(layer.slots.k.dense())[row, :, : LENGTH - QUERIES].swapaxes(0, 1)
            np.testing.assert_allclose(kept, expected, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_takes_the_directions_that_fit_all_of_it(prompt):
    """Keys before rotation and values of every layer, over all heads, against numpy's singular values."""
    model, _, state, found = prompt
    cache = sj.kv.preset("cskv", keys=0.5, values=0.5, window=QUERIES, group=14, capacity=64)
    new = sj.compact(model, state, cache)
    for i, (_, layer) in enumerate(new.layers):
        rotary = make_rotary(model.config.blocks[i].mixer.rope, 6, state.span)
        for row in range(2):
            _, k, v = (x[row, : LENGTH - QUERIES] for x in found[i])
            place = jnp.arange(LENGTH - QUERIES, dtype=jnp.uint32)[None, None]
            raw = rotary.moved(jnp.asarray(k.swapaxes(0, 1)[None], jnp.float32), -place)[0].swapaxes(0, 1)
            for slots, x in ((layer.k, np.asarray(raw, np.float64)), (layer.v, v)):
                expected = channels.low_rank(x, 0, LENGTH - QUERIES, channels.best_basis(x, 6))
                held = np.asarray(slots.dense())[row, :, : LENGTH - QUERIES].swapaxes(0, 1)
                np.testing.assert_allclose(held, expected, atol=1e-4)
    _, logits = read_stream(model, new, random_tokens(2, 16, seed=1), [1])
    assert np.isfinite(logits).all()


def test_shadows_of_a_prompt(prompt):
    """ShadowKV at a prompt's end: landmarks, and as outliers the pages with a key that is least like its own."""
    model, _, state, found = prompt
    new = sj.compact(model, state, SHADOWS)
    for (_, k, _), (_, layer) in zip(found, new.layers, strict=True):
        pages = k[:, : LENGTH - 8].reshape(2, 10, 4, 2, 6)
        marks = pages.mean(axis=2)
        np.testing.assert_allclose(layer.landmarks[:, :, :10], marks.swapaxes(1, 2), atol=1e-5)
        cosine = np.einsum("bpskd,bpkd->bkps", pages, marks)
        lengths = np.linalg.norm(marks, axis=-1).swapaxes(1, 2)[..., None]
        cosine /= np.linalg.norm(pages, axis=-1).transpose(0, 3, 1, 2) * lengths
        expected = np.argsort(cosine.min(axis=-1), axis=-1)[:, :, :2]
        assert layer.outliers.page.tolist() == expected.tolist()
        for row, head, i in np.ndindex(2, 2, 2):
            own = pages[row, expected[row, head, i], :, head]
            np.testing.assert_allclose(layer.outliers.k[row, head, i], own, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "asked"), [(THINK, QUERIES), (SHADOWS, None)], ids=["think", "shadow_kv"])
def test_streams_go_on_with_fewer_channels(prompt, cache, asked):
    model, tokens, state, _ = prompt
    new = sj.compact(model, state, cache, None if asked is None else tokens[:, -asked:])
    _, logits = read_stream(model, new, random_tokens(2, 16, seed=1), [1])
    assert np.isfinite(logits).all()
