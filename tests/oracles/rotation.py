"""RoPE in plain numbers, for the oracles that place tokens one by one."""

import math

import numpy as np


class Turning:
    """Rules whose positions enter by rotation, where they have `frequencies`, in radians a position."""

    frequencies: tuple[float, ...] | None

    def turned(self, x: np.ndarray, place: int) -> np.ndarray:
        """RoPE on the pairs (d, d + half)."""
        if self.frequencies is None:
            return x
        half, out = len(self.frequencies), x.copy()
        for d, frequency in enumerate(self.frequencies):
            c, s = math.cos(place * frequency), math.sin(place * frequency)
            out[d], out[d + half] = x[d] * c - x[d + half] * s, x[d + half] * c + x[d] * s
        return out
