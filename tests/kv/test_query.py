"""A query against cached keys: causality and reach by stream position, slots taken block by block."""

import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.kv import Query
from streamjax.kv import query as kv_query
from tests.kernels.test_partial import softmax64

B, K, H, D, SLOTS = 2, 2, 4, 4, 23
SLOPES = np.array([0.5, 0.1, 0.9, 0.3], np.float32)


def world(chunk: int, seed: int = 0):
    """A query of `chunk` tokens and a store whose slots are in no order and partly empty."""
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(B, chunk, H, D)).astype(np.float32)
    k, v = (draw.normal(size=(B, K, SLOTS, D)).astype(np.float32) for _ in range(2))
    behind = np.stack([draw.permutation(SLOTS) for _ in range(B)])[:, None] - 2  # two slots lie ahead of the query
    valid = draw.random((B, 1, SLOTS)) < 0.8
    return q, k, v, behind, valid


def query(q, base: int) -> Query:
    position = (base + np.arange(q.shape[1])) % 2**32
    q = jnp.asarray(q)
    return Query(
        q=q,
        raw_q=q,
        position=jnp.broadcast_to(jnp.asarray(position, jnp.uint32), q.shape[:2]),
        seen=jnp.zeros((B,), jnp.int32),
        slopes=jnp.asarray(SLOPES),
        rotary=None,
        scale=0.8,
        softcap=2.0,
    )


@pytest.mark.quick
@pytest.mark.parametrize("block", [4, 100])
@pytest.mark.parametrize(("chunk", "reach", "base"), [(1, None, 50), (1, 9, 50), (3, 7, 7), (3, None, 2**32 - 1)])
def test_blocks_of_slots_are_one_attention(monkeypatch, block, chunk, reach, base):
    monkeypatch.setattr(kv_query, "SLOT_BLOCK", block)
    monkeypatch.setattr(kv_query, "DECODE_SLOT_BLOCK", block)
    q, k, v, behind, valid = world(chunk)
    position = jnp.asarray((base - behind) % 2**32, jnp.uint32)
    got = query(q, base).attend(jnp.asarray(k), jnp.asarray(v), position, jnp.asarray(valid), reach=reach)
    distance = behind[:, :, None] + np.arange(chunk)[:, None]
    visible = valid[:, :, None] & (distance >= 0) & (distance <= (10**9 if reach is None else reach))
    out, lse = softmax64(q, k, v, visible, scale=0.8, softcap=2.0, slopes=SLOPES, distance=distance)
    np.testing.assert_allclose(got.out, out, atol=1e-5)
    np.testing.assert_allclose(got.lse, lse, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("filled", [(0, 0), (8, 0), (9, 23)])
@pytest.mark.parametrize("chunk", [1, 2])
def test_blocks_behind_the_filled_slots_are_not_read(monkeypatch, chunk, filled):
    """Keys there are NaN, which would show in the output if a block of them were visited."""
    block = 8
    monkeypatch.setattr(kv_query, "SLOT_BLOCK", block)
    monkeypatch.setattr(kv_query, "DECODE_SLOT_BLOCK", block)
    q, k, v, _, _ = world(chunk, seed=1)
    valid = np.arange(SLOTS) < np.array(filled)[:, None, None]
    visited = -(-max(filled) // block) * block
    if visited < SLOTS - block:  # the last block is moved back to fit
        k[:, :, visited:] = v[:, :, visited:] = np.nan
    position = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.uint32), (B, 1, SLOTS))
    arrays = jnp.asarray(k), jnp.asarray(v), position, jnp.asarray(valid)
    got = query(q, 25).attend(*arrays, filled=jnp.array(filled, jnp.int32))
    distance = (25 + np.arange(chunk)[:, None] - np.arange(SLOTS))[None, None]
    visible = np.broadcast_to(valid[:, :, None], (B, 1, chunk, SLOTS))
    out, lse = softmax64(q, k, v, visible, scale=0.8, softcap=2.0, slopes=SLOPES, distance=distance)
    np.testing.assert_allclose(got.out, out, atol=1e-5)
    np.testing.assert_allclose(got.lse, lse, atol=1e-5)
    if chunk > 1:
        lse = jnp.asarray(lse, jnp.float32)
        mass = query(q, 25).mass(arrays[0], *arrays[2:], lse, filled=jnp.array(filled, jnp.int32))
        clean = query(q, 25).mass(jnp.nan_to_num(arrays[0]), *arrays[2:], lse)
        np.testing.assert_allclose(mass, clean, atol=1e-6)
