"""What attention found in the layer order's forward pass, kept so that the backward pass does not compute it again.

The same for chunks as what `jax.checkpoint` does for whole sequences (rematerialisation-aware checkpointing,
DistFlashAttn 2310.03294): gradients of attention need its output and its log-sum-exp, and nothing else of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.partial import Partial
from streamjax.training.backprop.storage.activation_store import ActivationReader


@dataclasses.dataclass(frozen=True)
class KeptAttention:
    """Keeps and gives back attention's partials, of all chunks of all layers.

    Attributes:
      stacked: whether layers are rows of stacked ones, or single.
      count: chunks of a sequence.
      away: how many of them, the first ones, are kept in the host's memory.
    """

    stacked: bool
    count: int
    away: int

    def keep(self, parts: Partial | None) -> tuple[Partial | None, Partial | None]:
        """The partials of a layer's chunks, [N, B, C, ...], as two: in the host's memory, and on the device.

        A loop over the layers collects what this gives. None: a layer that does not attend.
        """
        here = jax.tree.map(lambda x: x[self.away :], parts)
        if not self.away:
            return None, here
        return jax.device_put(jax.tree.map(lambda x: x[: self.away], parts), jax.memory.Space.Host), here

    def reader(self, kept: Any, row: Any, position: int) -> ActivationReader:
        """Access to the partials of one layer's chunks; `kept` is what the loop has collected."""

        def select(place: int, i: Any) -> Partial | None:
            layer = kept[position][place] if self.stacked else kept[row][position][place]
            first = (row, i) if self.stacked else (i,)
            return jax.tree.map(lambda x: _entry(x, first), layer)

        def away(i: Any) -> Partial | None:
            return jax.device_put(select(0, i), jax.memory.Space.Device)

        return ActivationReader(lambda i: select(1, i - self.away), away, self.count, self.away)


def _entry(x: jax.Array, first: tuple[Any, ...]) -> jax.Array:
    """`x[first]` for traced indices."""
    for index in first:
        x = jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
    return x
