"""From numbers to codes: groups of weights, and whole rows whose errors make up for each other; NumPy, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float

Weights = Literal["int8", "int4"]

GROUP = 32  # weights with one scale
_SMALLEST_GROUP = 8
_RANGES = (1.0, 0.9, 0.8)  # of a group's weights, covered by its codes: where the search begins
_FITS = 2  # times that scale and offset are fitted to the codes
_TINY = np.finfo(np.float32).tiny


def quantise(
    values: Float[np.ndarray, "..."],
    inputs: Sequence[int],
    weights: Weights,
    factor: Float[np.ndarray, "n n"] | None = None,
) -> tuple[np.ndarray, ...]:
    """Codes, int8, offsets of int4, int8, and scales of a weight, or of a part of it with all of its input axes.

    Codes are rounded to the nearest, ties to the even one. Of int4, each group takes the scale and the offset that
    leave the smallest squared error, of a few ranges that it may cover and the fits of a line to their codes. The
    scales of int4 are bfloat16, those of int8 float32.

    Args:
      values: the weight.
      inputs: its input axes.
      weights: "int8" or "int4".
      factor: of int4 with one input axis, `calibration.error_factor` of what the weight meets: the errors of a row are
        then chosen one after the other, each to make up for those before it (GPTQ, 2210.17323). All alike where None.

    Raises:
      ValueError: int4, and the last input axis has no groups of 8 at least.
    """
    values = np.asarray(values, np.float32)
    if weights == "int8":
        scales = np.maximum(np.max(np.abs(values), axis=tuple(inputs), keepdims=True, initial=0) / 127, _TINY)
        return np.clip(np.rint(values / scales), -127, 127).astype(np.int8), scales.astype(np.float32)
    axis = inputs[-1] % values.ndim
    moved = np.moveaxis(values, axis, -1)
    rows = moved.reshape(-1, group_size(values.shape[axis]))
    found: tuple[np.ndarray, ...]
    if factor is None:
        found = _quantised_groups(np.ascontiguousarray(rows.T), None)
    else:
        found = _compensated(np.array(moved, np.float32).reshape(-1, len(factor)), factor, rows.shape[1])
    return tuple(np.moveaxis(x.T.reshape(*moved.shape[:-1], -1), -1, axis) for x in found)


def _compensated(rows: np.ndarray, factor: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """As `_quantised_groups` of all groups of all rows [R, n], which it overwrites.

    The error of a weight is spread over those of its row that have no codes yet, as far as they meet the same.
    """
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, rows.shape[1], size):
        stop = start + size
        group = np.ascontiguousarray(rows[:, start:stop].T)
        own = factor[start:stop, start:stop]
        importance = np.ascontiguousarray(np.broadcast_to(1 / own.diagonal()[:, None] ** 2, group.shape))
        codes, offsets, scales = _quantised_groups(group, importance)
        errors, width, shift = np.empty_like(group), scales.astype(np.float32)[0], offsets[0] / np.float32(16)
        for i, weights in enumerate(group):
            chosen = np.clip(np.rint(weights / width - shift), -8, 7)
            codes[i] = chosen
            errors[i] = (weights - (chosen + shift) * width) / own[i, i]
            group[i + 1 :] -= own[i, i + 1 :, None] * errors[i]
        rows[:, stop:] -= errors.T @ factor[start:stop, stop:]
        found.append((codes, offsets, scales))
    return tuple(np.stack(part, axis=2).reshape(len(part[0]), -1) for part in zip(*found, strict=True))


def _quantised_groups(rows: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [group, N], offsets [1, N] and scales [1, N] of groups of weights; NumPy adds fastest along axis 0."""
    low = np.minimum(rows.min(axis=0, keepdims=True), 0)
    width = np.maximum(rows.max(axis=0, keepdims=True), 0) - low
    best: tuple[np.ndarray, ...] = ()
    for share in _RANGES:
        scales = width * np.float32(share / 15)
        bottom = low + width * np.float32((1 - share) / 2)
        for fit in range(_FITS + 1):
            found = _rounded(rows, bottom, scales, importance)
            if fit < _FITS:
                bottom, scales = _fitted(rows, found[0], importance, bottom, scales)
            better = found[-1] < best[-1] if best else True
            best = best or found
            for new, old in zip(found, best, strict=True):
                np.copyto(old, new, where=better)
    codes, offsets, scales, _ = best
    return codes.astype(np.int8), offsets.astype(np.int8), scales.astype(ml_dtypes.bfloat16)


def _rounded(rows: np.ndarray, bottom: np.ndarray, scales: np.ndarray, importance: Any) -> tuple[np.ndarray, ...]:
    """Codes, offsets and scales, as float32, for groups whose lowest code is to stand for `bottom`; their errors."""
    scales = np.maximum(scales, _TINY).astype(ml_dtypes.bfloat16).astype(np.float32)
    offsets = np.clip(np.rint((bottom / scales + 8) * 16), -128, 127)
    codes = rows / scales
    codes -= offsets / 16
    np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
    errors = codes + offsets / 16
    errors *= scales
    errors -= rows
    errors *= errors
    if importance is not None:
        errors *= importance
    return codes, offsets, scales, errors.sum(axis=0, keepdims=True)


def _fitted(
    rows: np.ndarray, codes: np.ndarray, importance: Any, bottom: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bottom and scale of the line through each group's weights over its codes; the old ones where there is none."""
    share: Any = np.float32(1 / len(rows))
    if importance is not None:
        share = importance / np.maximum(importance.sum(axis=0, keepdims=True), _TINY)
    of_codes, of_rows = ((x * share).sum(axis=0, keepdims=True) for x in (codes, rows))
    weighted = codes - of_codes
    weighted *= share
    spread = (weighted * codes).sum(axis=0, keepdims=True)
    weighted *= rows
    slope = weighted.sum(axis=0, keepdims=True) / np.maximum(spread, _TINY)
    fits = (spread > 0) & (slope > 0)
    return np.where(fits, of_rows - slope * (of_codes + 8), bottom), np.where(fits, slope, scales)


def group_size(width: int) -> int:
    """How many neighbours along an axis share a scale of int4.

    Raises:
      ValueError: too few.
    """
    size = math.gcd(width, GROUP)
    if size < _SMALLEST_GROUP:
        raise ValueError(f"int4 has a scale for {GROUP} weights, and an axis of {width} has no such groups: take int8")
    return size
