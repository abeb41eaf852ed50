"""Hierarchical sparse attention, one query and one head at a time, in float64, as the papers' equations say it.

2504.16795, section 3: scores of the chunks before the token, the best K of them, the softmax of these K scores, and
the sum of the outputs of softmax attention inside each chunk, so weighted.
"""

import numpy as np


def hierarchical_attention(q, retrieval, k, v, landmarks, visible, top_k, scale):
    """q [C, H, D], retrieval [C, K, D], k and v [K, P, S, D], landmarks [K, P, D], visible [C, P] -> [C, H, D]."""
    arrays = (np.asarray(x, np.float64) for x in (q, retrieval, k, v, landmarks))
    q, retrieval, k, v, landmarks = arrays
    group = q.shape[1] // k.shape[0]
    out = np.zeros_like(q)
    for c in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv = head // group
            scores = {
                p: float(retrieval[c, kv] @ landmarks[kv, p]) / np.sqrt(landmarks.shape[-1])
                for p in range(k.shape[1])
                if visible[c, p]
            }
            best = sorted(scores, key=lambda p: -scores[p])[:top_k]
            total = sum(np.exp(scores[p]) for p in best)
            for p in best:
                logits = k[kv, p] @ q[c, head] * scale
                inside = np.exp(logits - logits.max())
                out[c, head] += np.exp(scores[p]) / total * (inside / inside.sum()) @ v[kv, p]
    return out
