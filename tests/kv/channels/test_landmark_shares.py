"""Shares of pages by their landmarks, in blocks and at once, against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.kv.channels import landmark_shares as module


@pytest.mark.parametrize(("queries", "held"), [(5, 11), (5, 4), (5, 0), (1, 11)])
def test_shares_are_those_of_a_softmax_over_the_free_pages(monkeypatch, queries, held):
    monkeypatch.setattr(module, "BLOCK", 4)  # 11 pages: the last block is moved back
    draw = np.random.default_rng(0)
    q, landmarks = draw.standard_normal((2, 2, 3, queries, 8)), draw.standard_normal((2, 2, 11, 8))
    free = (draw.random((2, 2, 11)) < 0.7) & (np.arange(11) < held)
    free[1, 1] = False  # a head with nothing to choose
    args = (*map(jnp.asarray, (q.astype(np.float32), landmarks.astype(np.float32), free)), 0.3)
    found = jax.jit(module.landmark_shares)(*args, jnp.int32(held))
    for row, head, query in np.ndindex(2, 2, queries):
        want = np.full((3, 11), -np.inf)
        for group in range(3):
            open_ = free[row, head]
            logits = 0.3 * landmarks[row, head, open_] @ q[row, head, group, query]
            if open_.any():
                want[group, open_] = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(found[row, head, query], want.max(axis=0), rtol=1e-5, atol=1e-5)
