"""Rules that keep fewer channels of every token, in loops over one stream's plain arrays, in float64."""

import dataclasses

import numpy as np

from tests.oracles.rotation import Turning


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


@dataclasses.dataclass
class Shadow(Turning):
    """ShadowKV (2410.21465) over a stream that is read token by token, behind a window; arrays are of one stream."""

    window: int
    group: int
    page: int
    top_k: int
    outliers: int
    rank: int
    scale: float
    frequencies: tuple[float, ...]

    def read(self, i, q, k, v):
        """What token i reads, [H, V], of keys before rotation [T, K, D], queries [T, H, D] and values."""
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        place = np.array([[self.turned(key, t) for key in keys] for t, keys in enumerate(k[: i + 1])])
        ask = np.array([self.turned(query, i) for query in q[i]])
        fell = max(i - self.window, 0)
        coded, pages = fell // self.group * self.group, fell // self.page
        low = place.copy()
        if coded:
            line = k[:coded].reshape(coded, -1)
            basis = best_basis(k[: self.group], self.rank)
            rebuilt = (line @ basis @ basis.T).reshape(coded, *k.shape[1:])
            low[:coded] = [[self.turned(key, t) for key in keys] for t, keys in enumerate(rebuilt)]
        out = np.zeros((q.shape[1], v.shape[-1]))
        for head in range(heads):
            some = [place[p * self.page : (p + 1) * self.page, head] for p in range(pages)]
            marks = [page.mean(axis=0) for page in some]
            like = [
                min(key @ m / np.linalg.norm(key) / np.linalg.norm(m) for key in page)
                for page, m in zip(some, marks, strict=True)
            ]
            apart = set(np.argsort(like, kind="stable")[: self.outliers].tolist())
            free = [p for p in range(coded // self.page) if p not in apart]
            mine = ask[head * group : (head + 1) * group]
            logits = np.array([[query @ marks[p] * self.scale for p in free] for query in mine])
            chosen = []
            if free:
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                wants = (weights / weights.sum(axis=1, keepdims=True)).max(axis=0)
                chosen = [free[j] for j in np.argsort(-wants)[: self.top_k]]
            keys, values = [], []
            for t in range(i + 1):
                if t >= coded or t // self.page in apart:
                    keys.append(place[t, head])
                elif t // self.page in chosen:
                    keys.append(low[t, head])
                else:
                    continue
                values.append(v[t, head])
            logits = mine @ np.array(keys).T * self.scale
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[head * group : (head + 1) * group] = weights @ np.array(values) / weights.sum(axis=1, keepdims=True)
        return out
