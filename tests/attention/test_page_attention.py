"""Pages chosen by landmarks: both forms of the attention against a slow loop, and the choice itself."""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import api
from pallas_kernels.api import platforms
from streamjax.attention.landmarks import page_choice, page_forms
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages, choose, top_indices
from tests.oracles.hierarchical import hierarchical_attention

WIDTH = 4
FORMS = ("dense", "gathered")
pytestmark = pytest.mark.quick


def draw(seed, rows, queries, heads, group, pages, size, dtype=jnp.float32):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    chunks = LandmarkPages(
        normal(rows, heads, pages, size, WIDTH),
        normal(rows, heads, pages, size, WIDTH),
        normal(rows, heads, pages, WIDTH),
    )
    number = jnp.asarray(random.permuted(np.tile(np.arange(-2, pages - 2), (rows, 1)), axis=1), jnp.int32)
    limit = jnp.asarray(np.sort(random.integers(0, pages + 1, (rows, queries)), axis=1), jnp.int32)
    return (
        normal(rows, queries, heads * group, WIDTH),
        normal(rows, queries, heads, WIDTH),
        chunks,
        VisiblePages(number, limit),
    )


def expected(q, retrieval, chunks, visible, top_k, scale):
    seen = np.asarray(visible.mask())[:, 0]
    rows = zip(*map(np.asarray, (q, retrieval, chunks.k, chunks.v, chunks.landmarks)), seen, strict=True)
    return np.stack([hierarchical_attention(*row, top_k, scale) for row in rows])


@settings(max_examples=settings().max_examples // 2)  # each is a program
@example(1, 2, 9, 2, 3, 9, 5, 4, "gathered")
@example(2, 2, 7, 2, 1, 4, 3, 10, "dense")
@given(
    st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 9), st.integers(1, 2), st.integers(1, 3),
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 10), st.sampled_from(FORMS),
)  # fmt: skip
def test_both_forms_are_the_published_sum(seed, rows, queries, heads, group, pages, size, top_k, form):
    """Any shape; pages in any order, some empty; queries that see no page at all get nothing."""
    q, retrieval, chunks, visible = draw(seed, rows, queries, heads, group, pages, size)
    found = jax.jit(partial(LandmarkPages.read, top_k=top_k, scale=0.7, implementation=form))(
        chunks, q, retrieval, visible
    )
    np.testing.assert_allclose(found, expected(q, retrieval, chunks, visible, top_k, 0.7), atol=2e-5)


@cache
def chosen_with_gradients(in_spans):
    """A function of landmarks, retrieval and what is visible; it is traced as it is called, `in_spans` or not."""

    def loss(landmarks, retrieval, visible):
        chosen, weights = choose(landmarks, retrieval, visible, 4)
        return jnp.sum(jnp.cos(jnp.arange(4.0)) * weights**2), (chosen, weights)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("pages", [160, 141])  # whole spans of 32, and not
@pytest.mark.parametrize("filled", [0.0, 0.3, 1.0])
def test_pages_searched_in_spans_are_those_of_all_scores(monkeypatch, pages, filled):
    """The same pages, weights and gradients; memories that are empty behind some page, or quite."""
    _, retrieval, chunks, visible = draw(3, 2, 9, 2, 1, pages, 1)
    number = np.where(np.arange(pages) < filled * pages, visible.number, -1)
    segments, of_chunks = np.arange(18).reshape(2, 9) % 2, np.arange(2 * pages).reshape(2, pages) // 3 % 2
    parts = number, np.maximum(visible.limit, 40), segments, of_chunks
    visible = VisiblePages(*(jnp.asarray(x, jnp.int32) for x in parts))
    (_, (chosen, weights)), grads = chosen_with_gradients(False)(chunks.landmarks, retrieval, visible)
    monkeypatch.setattr(page_choice, "SPAN", 32)
    monkeypatch.setattr(page_choice, "GROUP", 8)
    (_, (mine, found)), other = chosen_with_gradients(True)(chunks.landmarks, retrieval, visible)
    np.testing.assert_allclose(found, weights, atol=1e-6)
    np.testing.assert_array_equal(np.where(found > 0, mine, -1), np.where(weights > 0, chosen, -1))
    assert (filled > 0) == bool(np.any(found > 0))
    assert ((np.asarray(mine) >= 0) & (np.asarray(mine) < pages)).all()
    for a, b in zip(other, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_spans_without_a_page_are_not_scored(monkeypatch):
    """What lies there is NaN here, and would be seen by a product."""
    monkeypatch.setattr(page_choice, "SPAN", 64)
    _, retrieval, chunks, visible = draw(3, 1, 5, 1, 1, 256, 1)
    number = np.where(np.arange(256) < 70, np.arange(256), -1)[None]
    landmarks = np.array(chunks.landmarks)
    landmarks[:, :, 128:] = np.nan
    visible = VisiblePages(*(jnp.asarray(x, jnp.int32) for x in (number, np.asarray(visible.limit) + 60)))
    chosen, weights = jax.jit(choose, static_argnums=3)(jnp.asarray(landmarks), retrieval, visible, 3)
    assert np.isfinite(np.asarray(weights)).all()
    assert np.asarray(chosen)[np.asarray(weights) > 0].max() < 70


def test_queries_in_blocks_are_queries_at_once(monkeypatch):
    """Blocks that do and do not divide the queries, with segments, in both forms."""
    q, retrieval, chunks, visible = draw(0, 2, 11, 2, 2, 7, 3)
    segments, of_chunks = np.arange(22).reshape(2, 11) // 4, [[0, 1, 1, -1, 2, 0, 1], [3, 4, -1, 5, 3, 4, 2]]
    parts = np.tile(np.arange(7), (2, 1)), visible.limit, segments, of_chunks
    visible = VisiblePages(*(jnp.asarray(x, jnp.int32) for x in parts))
    whole = expected(q, retrieval, chunks, visible, 2, 1.0)
    assert np.abs(whole).sum() > 1
    assert (whole == 0).all(axis=(2, 3)).any()
    monkeypatch.setattr(page_forms, "QUERY_BLOCK", 4)
    for form in FORMS:
        found = jax.jit(lambda chunks, *given, form=form: chunks.read(*given, 2, 1.0, form))(
            chunks, q, retrieval, visible
        )
        np.testing.assert_allclose(found, whole, atol=2e-5)


@pytest.mark.parametrize("top_k", [2, 5])
def test_both_forms_have_the_same_gradients(top_k):
    """In float64, through the weights into the retrieval too; and a landmark's gradient is the slope of the sum."""
    with jax.enable_x64(True):
        *operands, visible = draw(1, 2, 6, 2, 2, 5, 3, jnp.float64)

        def loss(operands, form):
            q, retrieval, chunks = operands
            return jnp.sum(jnp.sin(chunks.read(q, retrieval, visible, top_k, 0.5, form)))

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        first, second = (gradient(operands, form) for form in FORMS)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, atol=1e-12)
        step = 1e-6 * jnp.ones_like(operands[2].landmarks).at[:, :, ::2].set(-1.0)

        def moved(sign):
            chunks = LandmarkPages(operands[2].k, operands[2].v, operands[2].landmarks + sign * step)
            return np.sum(np.sin(expected(operands[0], operands[1], chunks, visible, top_k, 0.5)))

        slope = float(jnp.sum(first[2].landmarks * step))
        assert slope == pytest.approx(float(moved(1) - moved(-1)) / 2, rel=1e-5)


@pytest.mark.parametrize(("start", "queries"), [pytest.param(None, 6, marks=pytest.mark.slow), (5, 11)])
def test_the_kernel_is_the_same_sum(monkeypatch, start, queries):
    """With gradients, through the weights into the retrieval too; by blocks of queries, some of which see no chunk."""
    kernel = partial(api.hsa_attention, implementation="triton", interpret=True)
    monkeypatch.setattr(page_forms.api, "hsa_attention", kernel)
    monkeypatch.setattr(page_forms, "QUERY_BLOCK", 4)
    q, retrieval, chunks, visible = draw(2, 2, queries, 2, 2, 5, 8)
    if start is not None:  # chunks in order, as a sequence has them
        number = jnp.tile(jnp.arange(5, dtype=jnp.int32), (2, 1))
        visible = VisiblePages(number, jnp.tile((start + jnp.arange(queries, dtype=jnp.int32)) // 8, (2, 1)))

    def loss(operands, form):
        q, retrieval, chunks = operands
        out = chunks.read(q, retrieval, visible, 3, 0.5, form, start)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, out), first), ((_, right), second) = (run((q, retrieval, chunks), form) for form in ("pallas", "gathered"))
    np.testing.assert_allclose(out, right, atol=1e-5)
    assert np.abs(out).sum() > 1
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_takes_the_kernel_where_it_pays(monkeypatch, caplog):
    """A platform with kernels, many chunks, and as many choices; it says so once."""
    taken = []
    monkeypatch.setattr(page_forms.api, "hsa_attention", lambda q, *_, **__: taken.append(q.shape[1]) or 0.0 * q)

    def read(queries, pages, size=8, dtype=jnp.float32, **known):
        q, retrieval, chunks, visible = draw(0, 1, queries, 1, 1, pages, size, dtype)
        jax.eval_shape(lambda: chunks.read(q, retrieval, visible, 1, 1.0, **known))
        return bool(taken) and bool(taken.pop())

    assert not read(12, 9)
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    platforms.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=platforms.__name__):
        assert read(12, 9)
        assert read(12, 9)
    assert [record.getMessage() for record in caplog.records] == [
        "hierarchical attention over many chunks: pallas, on cpu"
    ]
    assert not read(8, 9)  # more chunks than choices
    assert not read(12, 8)  # few chunks
    assert not read(12, 9, size=7)
    assert not read(12, 9, dtype=jnp.float16)
    assert not read(12, 9, implementation="gathered")
    assert read(2, 3, implementation="pallas")
    with pytest.raises(ValueError, match="unknown implementation 'sparse'"):  # the tests' own checks come first
        getattr(LandmarkPages.read, "__wrapped__", LandmarkPages.read)(*draw(0, 1, 2, 1, 1, 3, 8), 1, 1.0, "sparse")


largest = jax.jit(top_indices, static_argnums=1)


@given(st.integers(0, 10**6), st.sampled_from([3, 64, 700, 3000]), st.sampled_from([1, 5]))
def test_the_largest_are_found_through_their_groups(seed, total, count):
    """As a sort finds them, with many scores of -inf."""
    random = np.random.default_rng(seed)
    scores = random.permutation(total).astype(np.float32)
    scores[random.random(total) < 0.5] = -np.inf
    count = min(count, total)
    found = np.asarray(largest(scores[None], count))[0]
    assert ((found >= 0) & (found < total)).all()
    np.testing.assert_array_equal(np.sort(scores)[::-1][:count], scores[found])
