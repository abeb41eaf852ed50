"""Lines of the attention matrix in float64 numpy, a pair of query and key at a time. Nothing here is the library's."""

import numpy as np


def read_chunk(q, k, v, kept, scale, share, sample, band):
    """Outputs [C, H, D] of a chunk's queries behind `kept` stored tokens; k and v have those and the chunk's own.

    Also how many lines each key head read.
    """
    count, heads, out, lines = len(q), k.shape[1], np.zeros_like(q), []
    group = q.shape[1] // heads
    asked = [max((i + 1) * count // min(sample, count) - 1, 0) for i in range(min(sample, count))]
    for head in range(heads):
        given = {}  # of each pair of a query that is asked and a stored key
        for i in asked:
            for h in range(head * group, (head + 1) * group):
                weights = np.exp(scale * k[:kept, head] @ q[i, h])
                for s, weight in enumerate(weights / weights.sum()):
                    given[i, s] = given.get((i, s), 0.0) + weight
        worth = {}
        for (i, s), weight in given.items():
            worth["key", s] = worth.get(("key", s), 0.0) + weight
            name = "band", (kept + i - s) // band
            worth[name] = worth.get(name, 0.0) + weight / band
        chosen, held = set(), 0.0
        for line in sorted(worth, key=worth.get, reverse=True):
            if held >= share * sum(given.values()):
                break
            chosen.add(line)
            held = sum(w for (i, s), w in given.items() if {("key", s), ("band", (kept + i - s) // band)} & chosen)
        lines.append(chosen)
        for i in range(count):
            seen = [
                s for s in range(kept + i + 1) if s >= kept or {("key", s), ("band", (kept + i - s) // band)} & chosen
            ]
            for h in range(head * group, (head + 1) * group):
                weights = np.exp(scale * k[seen, head] @ q[i, h])
                out[i, h] = weights @ v[seen, head] / weights.sum()
    return out, lines
