"""Rules that keep fewer channels of every token, in loops over one stream's plain arrays, in float64."""

import numpy as np


def think(q, k, keep, window, group, observed):
    """ThinK (2407.21018): a stream's keys [T, K, D] as they are held at its end; queries are [T, H, D].

    Group n lies behind the first n groups and is full when `window` tokens stand behind it. By then some blocks of
    `group` tokens were over: of the newest of them the last `observed` queries decide, or nothing but keys.
    """
    held = k.copy()
    for start in range(0, len(k) - window - group + 1, group):
        closing = start + group + window - 1  # the token whose coming pushes the group's last one out of the window
        block = closing // group * group
        asks = q[block - observed : block] if block else np.ones_like(q[:1])
        held[start : start + group] = pruned(k[start : start + group], asks, keep, group)
    return held


def pruned(k, asks, keep, group):
    """Keys [T, K, D], of which whole groups have lost the channels that these queries [n, H, D] make least of."""
    held, (length, heads, width) = k.copy(), k.shape
    by_head = asks.reshape(len(asks), heads, -1, width)
    for start in range(0, length - group + 1, group):
        for head in range(heads):
            worth = np.sum(by_head[:, head] ** 2, axis=(0, 1)) * np.sum(k[start : start + group, head] ** 2, axis=0)
            held[start : start + group, head, np.argsort(worth)[: width - keep]] = 0
    return held


def attend(q, k, v, scale):
    """What queries [n, H, D] read of all keys [T, K, D] and values."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for i, h in np.ndindex(*q.shape[:2]):
        logits = k[:, h // group] @ q[i, h] * scale
        weights = np.exp(logits - logits.max())
        out[i, h] = weights @ v[:, h // group] / weights.sum()
    return out


def best_basis(x, rank):
    """The first right singular vectors of tokens [T, K, D], whose heads' channels stand side by side: [K D, R]."""
    if rank == x[0].size:
        return np.eye(rank)
    return np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)[2][:rank].T


def low_rank(x, window, group, basis):
    """Keys before rotation, or values, [T, K, D] as they are held at a stream's end: whole groups in coordinates."""
    held = x.copy()
    for start in range(0, len(x) - window - group + 1, group):
        line = x[start : start + group].reshape(group, -1)
        held[start : start + group] = (line @ basis @ basis.T).reshape(held[start : start + group].shape)
    return held
