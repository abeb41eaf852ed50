"""Merging partials: exact, associative, indifferent to empty parts, in value and in gradient."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.partial import Partial, add_sink_logits, merge, merge_stacked
from streamjax.attention import dense

attend = jax.jit(dense.attend, static_argnames=("scale", "softcap"))

B, C, H, K, S, D = 2, 3, 4, 2, 12, 5
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=shape).astype(np.float32) for shape in ((B, C, H, D), (B, K, S, D), (B, K, S, D)))
PARTS = [slice(0, 2), slice(2, 7), slice(7, 8), slice(8, S)]


def softmax64(q, k, v, visible, scale=1.0, softcap=None, slopes=None, distance=None):
    """Softmax attention in float64 by loops over rows, heads and queries: output, and log-sum-exp of the logits."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    visible = np.broadcast_to(visible, (q.shape[0], k.shape[1], q.shape[1], k.shape[2]))
    for b, c, h in np.ndindex(q.shape[:3]):
        kv = h // (q.shape[2] // k.shape[1])
        seen = visible[b, kv, c]
        if seen.any():
            logits = k[b, kv, seen] @ q[b, c, h] * scale
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            if slopes is not None:
                logits = logits - slopes[h] * np.broadcast_to(distance, visible.shape)[b, kv, c, seen]
            weights = np.exp(logits - logits.max())
            out[b, c, h] = weights @ v[b, kv, seen] / weights.sum()
            lse[b, c, h] = logits.max() + np.log(weights.sum())
    return out, lse


def part(q, k, v, keys: slice, visible=None) -> Partial:
    visible = np.ones((B, 1, C, S), bool) if visible is None else visible
    q, k, v, visible = (jnp.asarray(x) for x in (q, k[:, :, keys], v[:, :, keys], visible[..., keys]))
    return attend(q, k, v, visible, scale=0.7)


def assert_same(got: Partial, out, lse, tolerance=2e-6):
    np.testing.assert_allclose(got.out, out, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got.lse, lse, atol=tolerance, rtol=tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("shift", [0.0, 80.0, -80.0])
def test_merged_parts_are_attention_over_all_keys(shift):
    """Also where parts differ so much in size that an unshifted exponential would overflow."""
    keys = KEYS.copy()
    keys[:, :, PARTS[1]] += shift * np.sign(Q.mean())
    expected = softmax64(Q, keys, VALUES, True, scale=0.7)
    parts = [part(Q, keys, VALUES, keep) for keep in PARTS]
    assert_same(merge(*parts), *expected, tolerance=2e-5)
    assert_same(merge_stacked(Partial(*map(jnp.stack, zip(*parts, strict=True)))), *expected, tolerance=2e-5)


@pytest.mark.quick
def test_merge_is_associative_and_commutative():
    a, b, c, d = (part(Q, KEYS, VALUES, keep) for keep in PARTS)
    whole = merge(a, b, c, d)
    for order in itertools.permutations((a, b, c, d)):
        assert_same(merge(*order), *whole)
    assert_same(merge(merge(a, b), merge(c, d)), *whole)
    assert_same(merge(a, merge(b, merge(c, d))), *whole)
    assert_same(merge(merge(merge(a, b), c), d), *whole)


@pytest.mark.quick
def test_empty_parts_change_nothing():
    nothing = Partial(jnp.zeros((B, C, H, D)), jnp.full((B, C, H), -jnp.inf))
    some = part(Q, KEYS, VALUES, PARTS[1])
    for merged in (merge(some, nothing), merge(nothing, some), merge(nothing, some, nothing)):
        np.testing.assert_array_equal(merged.out, some.out)
        np.testing.assert_array_equal(merged.lse, some.lse)
    none = merge(nothing, nothing)
    np.testing.assert_array_equal(none.out, nothing.out)
    np.testing.assert_array_equal(none.lse, nothing.lse)
    with pytest.raises(ValueError, match="at least one"):
        merge()


@pytest.mark.quick
def test_a_query_that_sees_nothing_is_zero_with_minus_infinity():
    visible = np.ones((B, 1, C, S), bool)
    visible[0, 0, 1] = False
    got = part(Q, KEYS, VALUES, slice(0, S), visible)
    assert np.all(np.asarray(got.out)[0, 1] == 0)
    assert np.all(np.isneginf(np.asarray(got.lse)[0, 1]))
    assert_same(got, *softmax64(Q, KEYS, VALUES, visible, scale=0.7))


@pytest.mark.quick
def test_gradients_of_merged_parts_are_those_of_the_whole():
    """Some queries see nothing in one part, nothing in two, or nothing at all; gradients of `lse` are included."""
    visible = RNG.random((B, 1, C, S)) < 0.6
    visible[0, 0, 0, PARTS[1]] = False
    visible[0, 0, 1, PARTS[0]] = visible[0, 0, 1, PARTS[3]] = False
    visible[1, 0, 2] = False
    weight_out, weight_lse = RNG.normal(size=(B, C, H, D)), RNG.normal(size=(B, C, H))

    def loss(partial: Partial):
        lse = jnp.where(jnp.isneginf(partial.lse), 0.0, partial.lse)
        return jnp.sum(partial.out * weight_out) + jnp.sum(lse * weight_lse)

    def merged(q, k, v):
        return loss(merge(*(part(q, k, v, keep, visible) for keep in PARTS)))

    def whole(q, k, v):
        # plain softmax over finite logits; the one blind query contributes nothing
        group = jnp.repeat(k, H // K, axis=1), jnp.repeat(v, H // K, axis=1)
        logits = jnp.einsum("bchd,bhsd->bchs", q, group[0]) * 0.7
        seen = jnp.swapaxes(jnp.asarray(visible), 1, 2)
        logits = jnp.where(seen, logits, -1e30)
        any_seen = seen.any(-1)
        out = jnp.einsum("bchs,bhsd->bchd", jax.nn.softmax(logits, -1), group[1]) * any_seen[..., None]
        lse = jnp.where(any_seen, jax.nn.logsumexp(logits, -1), 0.0)
        return jnp.sum(out * weight_out) + jnp.sum(lse * weight_lse)

    got = jax.jit(jax.grad(merged, (0, 1, 2)))(Q, KEYS, VALUES)
    with jax.enable_x64():
        expected = jax.jit(jax.grad(whole, (0, 1, 2)))(*(jnp.asarray(x, jnp.float64) for x in (Q, KEYS, VALUES)))
    for one, other in zip(got, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert np.all(np.asarray(got[0])[1, 2] == 0)


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "softcap", "alibi", "both"])
def test_attend_is_softmax_attention(kv_heads, kind):
    k, v = (RNG.normal(size=(B, kv_heads, S, D)).astype(np.float32) for _ in range(2))
    visible = RNG.random((B, kv_heads, C, S)) < 0.7
    options = {}
    if kind in ("softcap", "both"):
        options["softcap"] = 0.9
    if kind in ("alibi", "both"):
        options["slopes"] = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
        options["distance"] = RNG.integers(0, 20, (B, 1, C, S)).astype(np.float32)
    expected = softmax64(Q, k, v, visible, scale=1.3, **options)
    arrays = {name: x if name == "softcap" else jnp.asarray(x) for name, x in options.items()}
    got = attend(*(jnp.asarray(x) for x in (Q, k, v, visible)), scale=1.3, **arrays)
    assert_same(got, *expected, tolerance=5e-6)


@pytest.mark.quick
def test_attend_accumulates_low_precision_in_float32():
    """Thousands of equal bfloat16 values average to themselves: a bfloat16 sum would stall at 256."""
    slots = 4096
    q = jnp.zeros((1, 1, 1, D), jnp.bfloat16)
    ones = jnp.full((1, 1, slots, D), 3.0, jnp.bfloat16)
    got = attend(q, ones, ones, jnp.ones((1, 1, 1, slots), bool), scale=1.0)
    assert got.out.dtype == jnp.float32
    assert got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out, 3.0, rtol=1e-6)
    np.testing.assert_allclose(got.lse, np.log(slots), rtol=1e-6)


def test_sinks_are_one_more_part_without_a_value():
    """In value and gradient; where nothing was attended, and beside logits whose exponentials would overflow."""
    visible = np.ones((B, 1, C, S), bool)
    visible[0, 0, 1] = False
    drawn = part(Q, KEYS, VALUES, slice(None), visible)
    sinks = jnp.asarray([0.5, -90.0, 3.0, 200.0])

    def merged(some, sinks):
        return merge(some, Partial(jnp.zeros_like(some.out), jnp.broadcast_to(sinks, some.lse.shape)))

    def loss(combine, some, sinks):
        found = combine(some, sinks)
        return jnp.sum(jnp.sin(3 * found.out)) + jnp.sum(jnp.cos(found.lse))

    assert_same(add_sink_logits(drawn, sinks), *merged(drawn, sinks))
    assert np.all(add_sink_logits(drawn, sinks).out[0, 1] == 0)
    mine, right = (jax.grad(partial(loss, combine), (0, 1))(drawn, sinks) for combine in (add_sink_logits, merged))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(right), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert add_sink_logits(drawn, None) is drawn
