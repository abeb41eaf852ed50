"""Masked logits of one tile of queries and keys: the same arithmetic in the kernels of every platform.

Tiles are [queries, keys], or transposed; indices of tokens follow from where the tile starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: differences of two of them are 0, not NaN
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static in a kernel of attention.

    Attributes:
      scale, softcap: of the logits.
      sinks: leading keys that all later queries see; they lie in an operand of their own.
      window: the newest keys that a query sees; None for all.
      keys: how many there are, without padding; ragged: whether there is padding.
      alibi, segmented: whether there are slopes, and segment ids.
      group: query heads of a key head.
      heads_first: whether keys lie [B, K, S, D], for kernels that take them either way.
      interpreted: whether an interpreter runs the kernel.
    """

    scale: float
    softcap: float | None
    sinks: int
    window: int | None
    keys: int
    ragged: bool
    alibi: bool
    segmented: bool
    group: int
    heads_first: bool = False
    interpreted: bool = False

    @property
    def exact(self) -> float:
        """What the kernel's logits are to be multiplied with, to be exponents of 2.

        Plain logits stay as the matrix unit gives them: the scale is part of this factor.
        """
        return LOG2E * (self.scale if self.plain else 1.0)

    @property
    def plain(self) -> bool:
        return self.softcap is None and not self.alibi


def logits(
    settings: Settings,
    dots: jax.Array,
    query: Any,
    key: Any,
    slope: Any,
    transposed: bool = False,
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> tuple[jax.Array, jax.Array | None]:
    """Logits before masking, in units of `exact`; and their derivative by the scaled dot products where that is not 1.

    Args:
      dots: products of queries [rows] and keys [columns]; the other way round where `transposed`.
      query, key: index of the first query and of the first key.
      slope: of the head, for ALiBi.
      tanh: for the soft cap.
    """
    if settings.plain:
        return dots, None
    x, derivative = dots * settings.scale, None
    if settings.softcap is not None:
        squashed = tanh(x * (1.0 / settings.softcap))
        x, derivative = settings.softcap * squashed, 1.0 - squashed * squashed
    if settings.alibi:
        queries, keys = _indices(dots.shape, transposed)
        x -= slope * (queries + (query - key) - keys).astype(jnp.float32)
    return x, derivative


def tile_mask(
    settings: Settings, shape: tuple[int, ...], query: Any, key: Any, segments: Any = None, transposed: bool = False
) -> jax.Array:
    """Which pairs of a tile count: by window, by the end of the keys, and by segment.

    segments: ids of the queries and of the keys, which broadcast against each other to `shape`.
    """
    queries, keys = _indices(shape, transposed)
    newest = queries + (query - key)  # compared, not subtracted: what depends on one axis alone is computed once for it
    seen = keys <= newest
    if settings.window is not None:
        seen &= keys > newest - settings.window
    if settings.ragged:
        seen &= keys < settings.keys - key
    if segments is not None:
        seen &= segments[0] == segments[1]
    return seen


def sink_visible(
    settings: Settings, shape: tuple[int, ...], query: Any, key: Any, segments: Any = None, transposed: bool = False
) -> jax.Array:
    """Which sinks [columns] count beside the window of queries [rows]: those that it has left behind."""
    assert settings.window is not None
    queries, keys = _indices(shape, transposed)
    seen = keys <= jnp.minimum(queries + (query - settings.window), settings.sinks - 1) - key
    if segments is not None:
        seen &= segments[0] == segments[1]
    return seen


def _indices(shape: tuple[int, ...], transposed: bool) -> tuple[jax.Array, jax.Array]:
    """Of queries and of keys in a tile."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (columns, rows) if transposed else (rows, columns)
