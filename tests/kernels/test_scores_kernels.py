"""Kernels that score pages, in interpreters, against float64; and the indexes of the library, which XLA computes."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, reference
from streamjax.kv.pages.indexes import Mean, MinMax
from tests.kernels.tolerances import BACKENDS, TOLERANCE


@lru_cache(maxsize=1)  # each case is asked of one interpreter after the other
def in_float64(
    pages, queries, *, bounds=False, parts=1, batch=1, heads=4, kv_heads=2, width=64, gaps=False, dtype="float32",
    seed=0,
):  # fmt: skip
    """Queries, summaries and which of them hold something, what goes with them, and what the reference gives."""
    random = np.random.default_rng(seed)
    q = jnp.asarray(random.standard_normal((batch, queries, heads, width)), dtype)
    summary = random.standard_normal((batch, kv_heads, pages, parts, 2 if bounds else 1, width))
    summary = jnp.asarray(-np.sort(-summary, axis=4).reshape(batch, kv_heads, pages, -1), dtype)  # the larger first
    some = jnp.asarray(random.random((batch, kv_heads, pages, parts)) < 0.6) if gaps else None
    known = {"bounds": bounds, "parts": parts}
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, summary))
        expected = np.asarray(jax.jit(partial(reference.page_scores, **known))(*exact, some))
    return q, summary, some, known, expected


def check(backend, pages, queries, *, block=None, dtype="float32", **drawn):
    """The kernel gives what the reference gives, and -inf for pages without anything."""
    q, summary, some, known, expected = in_float64(pages, queries, dtype=dtype, **drawn)
    run = jax.jit(lambda *arrays: api.page_scores(*arrays, block=block, **BACKENDS[backend], **known))
    found = np.asarray(run(q, summary, some), np.float64)
    assert found.shape == (q.shape[0], q.shape[2], queries, pages)
    held = ~np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(found), ~held)
    if held.any():
        worst = np.max(np.abs(found[held] - expected[held]))
        assert worst < TOLERANCE[dtype] * np.max(np.abs(expected[held]))


@pytest.mark.weekly("bf16-tpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pages", "queries", "options"),
    [
        pytest.param(300, 1, {"bounds": True, "batch": 2}, id="bounds"),
        pytest.param(130, 3, {"parts": 3, "gaps": True, "bounds": True}, id="parts-with-gaps"),
        pytest.param(7, 5, {"width": 80, "heads": 6}, id="few-pages"),
        pytest.param(600, 40, {"dtype": "bfloat16", "width": 128, "parts": 2, "block": 128}, id="bf16"),
    ],
)
def test_matches_float64(backend, pages, queries, options):
    check(backend, pages, queries, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=3)
@given(data=st.data())
def test_drawn(backend, data):
    check(
        backend, data.draw(st.integers(1, 280)), data.draw(st.integers(1, 9)), bounds=data.draw(st.booleans()),
        parts=data.draw(st.integers(1, 4)), heads=data.draw(st.sampled_from([2, 6])), gaps=data.draw(st.booleans()),
        width=data.draw(st.sampled_from([64, 96, 256])), dtype=data.draw(st.sampled_from(sorted(TOLERANCE))),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [pytest.param(MinMax(), marks=pytest.mark.slow), MinMax(parts=2), Mean()])
def test_is_what_the_indexes_say(backend, index):
    random = np.random.default_rng(0)
    keys = jnp.asarray(random.standard_normal((2, 2, 9, 8, 64)), jnp.float32)
    held = np.arange(72) < np.array([[50], [72]])  # the last pages of the first row are empty
    valid = jnp.asarray(held.reshape(2, 1, 9, 8))
    q = jnp.asarray(random.standard_normal((2, 3, 4, 64)), jnp.float32)
    summary = index.summarise(keys, valid)
    expected = index.scores(summary, rearrange(q, "b c (k g) d -> b k (c g) d", k=2))
    expected = rearrange(expected, "b k (c g) p -> b (k g) c p", g=2)
    more = {}
    if isinstance(index, MinMax):
        summary, some = summary
        more = {"some": jnp.broadcast_to(some, (2, 2, *some.shape[2:])), "bounds": True, "parts": index.parts}
    found = api.page_scores(q, summary, **more, **BACKENDS[backend])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": 2}, "use .B, C, H, D. and .B, K, P, 2 x 64."),
        ({"bounds": True}, "1 x 128"),
        ({"q": jnp.zeros((1, 1, 3, 64))}, "multiple of the key heads"),
        ({"some": jnp.ones((1, 2, 9, 2), bool)}, "in 1 parts"),
        ({"q": jnp.zeros((1, 1, 4, 64), jnp.bfloat16)}, "bfloat16 or float32 for both"),
        ({"implementation": None}, "no kernel for scores for cpu"),
        ({"implementation": "triton", "block": 24}, "blocks of 24 pages"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    arguments = {"q": jnp.zeros((1, 1, 4, 64)), "summary": jnp.zeros((1, 2, 9, 64)), "implementation": "tpu"}
    unchecked = getattr(api.page_scores, "__wrapped__", api.page_scores)
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments | change)
