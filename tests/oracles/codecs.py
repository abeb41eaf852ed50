"""KIVI's rule (2402.02750) in loops over plain arrays: a stream's tokens after they have been stored in codes."""

import ml_dtypes
import numpy as np


def bfloat16_below(x: float) -> float:
    """The greatest bfloat16 that is not above a float32."""
    x = float(np.float32(x))
    near = np.array(x, np.float32).astype(ml_dtypes.bfloat16)
    while float(near) > x:
        near = np.nextafter(near, np.array(-np.inf, ml_dtypes.bfloat16))
    return float(near)


def stored(x: np.ndarray, bits: int, fit: str = "range") -> np.ndarray:
    """A row of numbers after it has been coded between its least and its greatest, or a part of that that fits best."""
    x = x.astype(np.float32)
    low, high = x.min(), x.max()
    found = between(x, low, high, bits)
    if fit == "range" or low == high:
        return found
    unit = np.float32(2048) / (high - low)

    def error(found: np.ndarray) -> int:
        return int((np.round((found - x) * unit).astype(np.int64) ** 2).sum())

    for part in (0.9, 0.8, 0.7, 0.6, 0.5):
        cut = (high - low) * np.float32((1 - part) / 2)
        other = between(x, low + cut, high - cut, bits)
        found = other if error(other) < error(found) else found
    return found


def between(x: np.ndarray, low: np.float32, high: np.float32, bits: int) -> np.ndarray:
    """The same between two numbers."""
    most = 2**bits - 1
    least = np.float32(bfloat16_below(low))
    step = np.float32(-bfloat16_below(-np.float32((high - least) * np.float32(1 / most))))
    if step == 0:
        return np.full_like(x, least)
    codes = np.clip(np.round((x - least) / step), 0, most)
    return (least.astype(np.float64) + step.astype(np.float64) * codes).astype(np.float32)


def by_channel(x: np.ndarray, bits: int, fit: str = "range") -> np.ndarray:
    """A group of tokens [G, D], each channel by itself."""
    return np.stack([stored(column, bits, fit) for column in x.T], axis=1)


def by_token(x: np.ndarray, bits: int, group: int, fit: str = "range") -> np.ndarray:
    """Tokens [G, D], `group` channels at a time."""
    width = min(group, x.shape[1])
    return np.stack([np.concatenate([stored(part, bits, fit) for part in row.reshape(-1, width)]) for row in x])


def gear(x: np.ndarray, bits: int, rank: int, outliers: int, channels: bool) -> tuple[np.ndarray, np.ndarray]:
    """A group of tokens [G, D] by GEAR's parts, and which numbers are kept apart (2403.05527)."""
    coded = by_channel(x, bits, "error") if channels else by_token(x, bits, x.shape[1], "error")
    left, apart = x.astype(np.float64) - coded, np.zeros(x.shape, bool)
    for token, row in enumerate(np.abs(left)):
        apart[token, np.argsort(-row)[:outliers]] = True
    left[apart] = 0
    u, s, v = np.linalg.svd(left)
    return np.where(apart, x, coded + (u[:, :rank] * s[:rank]) @ v[:rank]), apart


def kivi(x: np.ndarray, bits: int, group: int, residual: int, channels: bool, fit: str = "range") -> np.ndarray:
    """A row's tokens [n, D] as they are held: all groups but what waits have been coded."""
    held = x.copy()
    for start in range(0, len(x) - residual - group + 1, group):
        some = x[start : start + group]
        coded = by_channel(some, bits, fit) if channels else by_token(some, bits, group, fit)
        held[start : start + group] = coded
    return held
