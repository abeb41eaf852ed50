"""What the TPU's kernels of attention share: sizes of vectors and of pieces, and products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.tile_logits import Settings

LANES = 128
SUBLANES = 8
PIECE, MASKED_PIECE = 512, 256  # rows of a tile that are worked on at once
NT = (((1,), (1,)), ((), ()))  # contract the last axes of both
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def pieces(block: int, first: Any, masked: bool = False) -> Iterator[tuple[Any, Any]]:
    """The rows of a tile in turns: slices, and the index of the first token of each.

    Products of one piece overlap with exponentials of another; masks are kept in fewer registers if pieces are small.
    """
    for start in range(0, block, size := min(block, MASKED_PIECE if masked else PIECE)):
        yield pl.ds(start, min(size, block - start)), first + start


def when_runs(settings: Settings, ranges: Ranges, runs: Any, i: Any, j: Any, offset: Any, tile: Any) -> None:
    """The tile of query block i and key block j, by the code that it needs."""
    if settings.segmented:
        pl.when(runs)(partial(tile, True))
        return
    interior = runs & ranges.interior(i, j, offset)
    pl.when(interior)(partial(tile, False))
    pl.when(runs & ~interior)(partial(tile, True))


def dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    """A product that is summed in float32; of float32 numbers in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def across(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal columns as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.broadcast_to(x[:, :1], (x.shape[0], width)) if width % LANES else jnp.tile(x, (1, width // LANES))
