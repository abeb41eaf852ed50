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


def block_floats(x: np.ndarray, bits: int, block: int, sort: bool) -> np.ndarray:
    """A group of tokens [G, D] in block floating point (2403.20137)."""
    largest = np.abs(x).max(axis=0)
    order = sorted(range(x.shape[1]), key=lambda c: (-largest[c], c)) if sort else list(range(x.shape[1]))
    found = np.zeros_like(x, np.float64)
    for token, row in enumerate(x.astype(np.float64)):
        for start in range(0, len(order), block):
            some = order[start : start + block]
            top = np.abs(row[some]).max()
            if top == 0:
                continue
            last = 2.0 ** (np.floor(np.log2(top)) - bits + 2)
            found[token, some] = np.clip(np.round(row[some] / last), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * last
    return found


def fireq(x: np.ndarray, bits: int, top: int, keys: bool) -> np.ndarray:
    """A group of tokens [G, D]: pairs of channels scaled alike, then symmetric codes (2505.20839)."""
    half, scale = x.shape[1] // 2, np.ones(x.shape[1])
    if keys:
        for c in range(half):
            scale[c] = scale[c + half] = max(np.hypot(row[c], row[c + half]) for row in x.astype(np.float64))
        largest = np.abs(x).max(axis=0)
        for c in sorted(range(2 * half), key=lambda c: (-largest[c], c))[:top]:
            for one in (c, (c + half) % (2 * half)):
                scale[one] = largest[one]
    scaled = x / scale
    step = np.abs(scaled).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(scaled / step) * step * scale


def mixed(x: np.ndarray, wide: int, keys: bool, transform: bool) -> np.ndarray:
    """A group of tokens [G, D]: two bits in wide channels, signs elsewhere (2503.16257)."""
    found = np.zeros(x.shape)
    if not keys:
        for c, column in enumerate(x.T.astype(np.float64)):
            size = np.abs(column).mean()
            found[:, c] = np.where(np.abs(column) > size / 2, np.sign(column), 0) * size
        return found
    spread = x.max(axis=0) - x.min(axis=0)
    ranked = sorted(range(x.shape[1]), key=lambda c: (-spread[c], c))
    first, rest = sorted(ranked[:wide]), sorted(ranked[wide:])
    if first:
        found[:, first] = by_channel(x[:, first], 2)
    narrow, n = x[:, rest].astype(np.float64), len(rest)
    turn = np.array(
        [[np.cos(2 * np.pi * i * j / n) + np.sin(2 * np.pi * i * j / n) for j in range(n)] for i in range(n)]
    )
    turn = turn / np.sqrt(n) if transform else np.eye(n)
    coefficients = narrow @ turn
    found[:, rest] = np.where(coefficients >= 0, 1, -1) * np.abs(coefficients).mean(axis=0) @ turn.T
    return found


def coupled(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Tokens [n, D] as entries of the books [P, E, c] of their runs of channels (2405.03917)."""
    found = np.zeros(x.shape)
    width = books.shape[2]
    for token, row in enumerate(x.astype(np.float64)):
        for part, book in enumerate(books.astype(np.float64)):
            run = row[part * width : (part + 1) * width]
            found[token, part * width : (part + 1) * width] = min(
                book, key=lambda entry, run=run: ((entry - run) ** 2).sum()
            )
    return found
