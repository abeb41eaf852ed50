"""Blockwise attention against attention with all logits in float64, values and gradients, over drawn shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.patterns import Chunked, Full, SinkWindow, SlidingWindow
from streamjax.attention import blockwise
from streamjax.attention.flash import flash_attention


def reference(q, k, v, pattern, scale, segments, offset, softcap, slopes):
    """Every logit, in float64, straight from the definition; masks by plain loops."""
    heads, kv_heads = q.shape[2], k.shape[2]
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    mask = np.zeros((q.shape[0], q.shape[1], k.shape[1]), bool)
    distance = np.zeros(mask.shape[1:])
    for t in range(q.shape[1]):
        for s in range(k.shape[1]):
            gap = t + offset - s
            distance[t, s] = gap
            seen = gap >= 0
            if isinstance(pattern, SlidingWindow):
                seen = 0 <= gap < pattern.window
            if isinstance(pattern, SinkWindow):
                seen = gap >= 0 and (gap < pattern.window or s < pattern.sinks)
            if isinstance(pattern, Chunked):
                seen = gap >= 0 and (t + offset) // pattern.size == s // pattern.size
            for b in range(q.shape[0]):
                mask[b, t, s] = seen and (segments is None or segments[0][b, t] == segments[1][b, s])
    if slopes is not None:
        logits = logits - slopes[:, None, None] * distance
    logits = jnp.where(mask[:, None], logits, -1e30)
    top = jnp.max(logits, -1, keepdims=True)
    p = jnp.where(mask[:, None], jnp.exp(logits - top), 0.0)
    total = p.sum(-1, keepdims=True)
    out = jnp.einsum("bhts,bshd->bthd", p / jnp.maximum(total, 1e-300), v)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-300)), -jnp.inf)[..., 0]
    return out, jnp.swapaxes(lse, 1, 2)


PATTERNS = st.one_of(
    st.just(Full()),
    st.builds(SlidingWindow, st.integers(1, 40)),
    st.builds(SinkWindow, st.integers(0, 9), st.integers(1, 30)),
    st.builds(Chunked, st.integers(1, 40)),
)


@pytest.mark.quick
@settings(max_examples=settings().max_examples // 3)  # each is two programs
@example(pattern=SinkWindow(3, 7), kv_heads=2, group=3, keys=17, offset=5, packed=True, softcap=2.0, alibi=True, seed=1)
@example(pattern=Chunked(7), kv_heads=1, group=3, keys=48, offset=0, packed=False, softcap=None, alibi=False, seed=2)
@given(
    pattern=PATTERNS,
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    keys=st.sampled_from([1, 17, 48]),
    offset=st.sampled_from([0, 5]),
    packed=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    alibi=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_float64(pattern, kv_heads, group, keys, offset, packed, softcap, alibi, seed):
    rng = np.random.default_rng(seed)
    heads, width, batch = kv_heads * group, 8, 2
    queries = keys if offset == 0 else 11
    with jax.enable_x64(True):
        q = jnp.asarray(rng.normal(size=(batch, queries, heads, width)))
        k, v = (jnp.asarray(rng.normal(size=(batch, keys, kv_heads, width))) for _ in range(2))
        ids = np.sort(rng.integers(0, 3, (batch, max(keys, queries) + offset)), axis=1).astype(np.int32)
        segments = (ids[:, offset : offset + queries], ids[:, :keys]) if packed else None
        slopes = jnp.asarray(0.5 ** np.arange(1, heads + 1)) if alibi else None
        c_out = jnp.asarray(rng.normal(size=q.shape))
        c_lse = jnp.asarray(rng.normal(size=q.shape[:3]))

        def loss(fn):
            def run(q, k, v):
                out, lse = fn(q, k, v)
                finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
                return jnp.sum(out * c_out) + jnp.sum(finite * c_lse), (out, lse)

            return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)

        def ours(q, k, v):
            ids = None if segments is None else tuple(jnp.asarray(s) for s in segments)
            return flash_attention(
                q, k, v, pattern, scale=0.4, segment_ids=ids, offset=offset, softcap=softcap, slopes=slopes,
                block_q=8, block_k=16,
            )  # fmt: skip

        def plain(q, k, v):
            return reference(q, k, v, pattern, 0.4, segments, offset, softcap, slopes)

        (_, (out, lse)), grads = loss(ours)
        (_, (out_ref, lse_ref)), grads_ref = loss(plain)
    np.testing.assert_allclose(out, out_ref, atol=1e-11)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse_ref))
    some = ~np.isneginf(lse)
    np.testing.assert_allclose(np.asarray(lse)[some], np.asarray(lse_ref)[some], atol=1e-11)
    for ours_grad, ref_grad in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(ours_grad, ref_grad, atol=1e-10)


@pytest.mark.parametrize(
    ("pattern", "needed"),
    [
        (Full(), lambda t, s: s <= t),
        (SlidingWindow(20), lambda t, s: t - 20 < s <= t),
        (SinkWindow(3, 20), lambda t, s: s <= t and (t - 20 < s or s < 3)),
    ],
)
def test_visits_only_blocks_that_the_pattern_needs(pattern, needed, monkeypatch):
    """Count executed key blocks; the count must be that of blocks which hold at least one visible pair."""
    length, block = 128, 16
    visited = []
    original = blockwise._logits

    def counting(blocks, queries, keys, i, j):
        jax.debug.callback(lambda a, b: visited.append((int(a), int(b))), i, j)
        return original(blocks, queries, keys, i, j)

    monkeypatch.setattr(blockwise, "_logits", counting)
    x = jnp.ones((1, length, 1, 8))
    jax.block_until_ready(flash_attention(x, x, x, pattern, scale=1.0, block_q=block, block_k=block))
    jax.effects_barrier()
    expected = {(t // block, s // block) for t in range(length) for s in range(length) if needed(t, s)}
    assert sorted(visited) == sorted(expected)
