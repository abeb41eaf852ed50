"""Recurrences over a matrix state token by token in float64 numpy, as their papers write them."""

import numpy as np


def recurrence(q, k, v, log_decay, state, beta=None, resets=None):
    """Outputs and the last state: `S = decay S + k v^T`, or by the delta rule `S = S' + k (beta (v - S'^T k))^T` with
    S' = decay S; each token reads `S^T q`. Shapes are those of `streamjax.attention.recurrent.recurrence`."""
    q, k, v, log_decay = (np.asarray(x, np.float64) for x in (q, k, v, log_decay))
    state = np.array(state, np.float64)
    rows, length, groups, shared = v.shape[:4]
    out = np.zeros(v.shape)
    for b in range(rows):
        for head in range(groups * shared):
            g, r = divmod(head, shared)
            s = state[b, head]
            for t in range(length):
                if resets is not None and resets[b, t]:
                    s = np.zeros_like(s)
                decay = np.exp(log_decay[b, t, g, r])
                s = (decay[:, None] if np.ndim(decay) else decay) * s
                write = v[b, t, g, r]
                if beta is not None:
                    write = float(beta[b, t, g, r]) * (write - s.T @ k[b, t, g])
                s = s + np.outer(k[b, t, g], write)
                out[b, t, g, r] = s.T @ q[b, t, g]
            state[b, head] = s
    return out, state


def generalised_delta(q, k, v, erase, write, log_decay, state, resets=None):
    """Outputs and the last state: `S = decay S + write (erase^T S)^T + k v^T`; each token reads `S^T q`. Shapes are
    those of `streamjax.attention.generalised_delta.generalised_delta`."""
    q, k, v, erase, write, log_decay = (np.asarray(x, np.float64) for x in (q, k, v, erase, write, log_decay))
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    rows, length, heads = v.shape[:3]
    for b in range(rows):
        for head in range(heads):
            s = state[b, head]
            for t in range(length):
                at = b, t, head
                if resets is not None and resets[b, t]:
                    s = np.zeros_like(s)
                s = np.exp(log_decay[at])[:, None] * s + np.outer(write[at], s.T @ erase[at]) + np.outer(k[at], v[at])
                out[at] = s.T @ q[at]
            state[b, head] = s
    return out, state
