"""Rules that keep something of several layers together, in loops over one stream's plain arrays, in float64."""

import numpy as np


def minicache(low, high, toward, apart):
    """MiniCache (2405.14366): keys and values (k, v) of two layers, each [T, K, D], as both layers read them again.

    Directions are interpolated on the sphere and each layer's lengths are kept; in each head the `apart` tokens whose
    keys or values turn most between the layers stay.
    """
    length, heads = low[0].shape[:2]
    found = [[x.copy() for x in layer] for layer in (low, high)]
    for head in range(heads):
        turns = []
        for t in range(length):
            angles = []
            for part in range(2):
                a, b = low[part][t, head], high[part][t, head]
                one, other = a / np.linalg.norm(a), b / np.linalg.norm(b)
                angle = np.arccos(np.clip(one @ other, -1, 1))
                middle = (np.sin((1 - toward) * angle) * one + np.sin(toward * angle) * other) / np.sin(angle)
                found[0][part][t, head], found[1][part][t, head] = (
                    middle * np.linalg.norm(a),
                    middle * np.linalg.norm(b),
                )
                angles.append(angle)
            turns.append(max(angles))
        for t in np.argsort(turns)[::-1][:apart]:
            for mine, theirs in zip(found, (low, high), strict=True):
                for part in range(2):
                    mine[part][t, head] = theirs[part][t, head]
    return found


def xkv(layers, rank):
    """xKV (2503.18893): keys before rotation, or values, [T, K, D] of several layers, decomposed side by side."""
    length, heads, width = layers[0].shape
    line = np.concatenate([x.reshape(length, -1) for x in layers], axis=1)
    u, s, v = np.linalg.svd(line, full_matrices=False)
    low = u[:, :rank] * s[:rank] @ v[:rank]
    return [x.reshape(length, heads, width) for x in np.split(low, len(layers), axis=1)]
