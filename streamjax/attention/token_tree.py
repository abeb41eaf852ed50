"""Token trees: several ways in which streams may go on, read by a model as one chunk (SpecInfer, 2305.09781).

The nodes of a tree lie in a chunk, parents before their children; node 0 is the root. A node stands as many positions
behind the stream as there are nodes above it, and sees the stream, its ancestors and itself. The tree

    0: the ── 1: cat ── 3: sat
           └─ 2: dog ── 4: ran

has the parents [0, 0, 0, 1, 2], the depths [0, 1, 1, 2, 2], and node 4 sees the nodes 0, 2 and 4.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """The shape of a tree of N nodes for each of B streams.

    parent: int32 [B, N], of the root 0. depth: nodes above each, int32 [B, N]. given: which nodes are there at all, of
    no missing parent, bool [B, N]. sees: `sees[b, i, j]` says that node j is node i or above it. levels: no node is
    this deep (static).
    """

    parent: Int32[Array, "B N"]
    depth: Int32[Array, "B N"]
    given: Bool[Array, "B N"]
    sees: Bool[Array, "B N N"]
    levels: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_parents(cls, parent: Int32[Array, "B N"], given: Bool[Array, "B N"], levels: int) -> TokenTree:
        """The tree of these parents, `parent[b, i] < i`; nodes as deep as `levels`, or of a missing parent, are not
        given."""
        nodes = parent.shape[1]
        every = jnp.arange(nodes, dtype=jnp.int32)
        parent = jnp.where(every > 0, jnp.clip(parent, 0, jnp.maximum(every - 1, 0)), 0)
        root = every == 0
        direct = (parent[:, :, None] == every) & ~root[:, None]  # [B, node, its parent]
        sees = direct | jnp.eye(nodes, dtype=bool)
        for _ in range((levels - 1).bit_length()):  # up to twice as far each time
            sees = jnp.einsum("bij,bjk->bik", sees.astype(jnp.int32), sees.astype(jnp.int32)) > 0
        depth = jnp.sum(sees, axis=2, dtype=jnp.int32) - 1
        there = jnp.all(given[:, None] | ~sees, axis=2) & sees[:, :, 0] & (depth < levels)
        return cls(parent, jnp.minimum(depth, levels - 1), there, sees, levels)

    def cut(self, levels: Int32[Array, " B"]) -> TokenTree:
        """The tree without the nodes of each row that are as deep as its number of levels, or deeper."""
        return dataclasses.replace(self, given=self.given & (self.depth < levels[:, None]))

    def paths(self) -> tuple[Int32[Array, "B N D"], Bool[Array, "B N D"]]:
        """For each node the nodes from the root to itself, padded on the right, and which of them are no padding."""
        level = jnp.arange(self.levels, dtype=jnp.int32)
        here = self.sees[:, :, None] & (self.depth[:, None, None] == level[:, None])  # [B, N, D, N]
        return jnp.argmax(here, axis=3).astype(jnp.int32), level <= self.depth[:, :, None]
