"""`GroupedLayers`: coordinates of several layers' keys and values together (xKV, Chang et al., 2503.18893)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.field_checks import Fraction, Size
from streamjax.kv.channels.bases import best_basis
from streamjax.kv.channels.lent import Lent
from streamjax.kv.query import SLOT_BLOCK, KVSpec, Query, State, Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedCoordinates:
    """What the layers share: of each token its coordinates, one list for all heads of all layers."""

    k: Float[Array, "B 1 S R"]
    v: Float[Array, "B 1 S Q"]
    position: UInt32[Array, "B 1 S"]
    count: Int32[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bases:
    """What a layer has itself: the directions of which these are the coordinates, in the channels of its heads."""

    k: Float[Array, "B K D R"]
    v: Float[Array, "B K V Q"]


@dataclasses.dataclass(frozen=True)
class GroupedLayers(Lent):
    """Tokens of several layers as coordinates in one basis of all their channels, which fits these tokens best.

    Keys are coordinates of what they were before rotation, and are rotated again when they are read.

    Args:
      layers: of the group.
      keys, values: shares of the channels of all layers that are left.
    """

    layers: Size = 4
    keys: Fraction = 0.125
    values: Fraction = 0.1875

    def _rank(self, share: float, channels: int) -> int:
        return max(1, round(share * self.layers * channels))

    def init(self, spec: KVSpec) -> Bases:
        widths = spec.head_dim, spec.values(0).shape[3]
        ranks = [self._rank(s, spec.kv_heads * d) for s, d in zip((self.keys, self.values), widths, strict=True)]
        shape = spec.batch_size, spec.kv_heads
        return Bases(*(jnp.zeros((*shape, d, r), spec.dtype) for d, r in zip(widths, ranks, strict=True)))

    def shared(self, spec: KVSpec) -> SharedCoordinates:
        own = self.init(spec)
        shape = spec.batch_size, 1, self.size
        k, v = (jnp.zeros((*shape, x.shape[3]), spec.dtype) for x in (own.k, own.v))
        return SharedCoordinates(k, v, jnp.zeros(shape, jnp.uint32), spec.counter())

    def shared_and_own(self, held: Sequence[Stored], raw_k: Sequence[Array]) -> tuple[SharedCoordinates, list[State]]:
        valid, heads = held[0].valid[:, 0], held[0].k.shape[1]

        def shortened(parts: Sequence[Array], share: float) -> tuple[Array, list[Array]]:
            line = jnp.concatenate(parts, axis=1)  # the heads of all layers side by side
            basis = best_basis(line, valid, self._rank(share, heads * line.shape[3]))
            made = jnp.einsum("bktd,bkdr->btr", line.astype(jnp.float32), basis, precision="highest")
            return made.astype(line.dtype)[:, None], jnp.split(basis.astype(line.dtype), len(parts), axis=1)

        k, k_bases = shortened(raw_k, self.keys)
        v, v_bases = shortened([layer.v for layer in held], self.values)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        return SharedCoordinates(k, v, held[0].position, count), [
            Bases(*pair) for pair in zip(k_bases, v_bases, strict=True)
        ]

    def attend(self, state: Bases, query: Query, reach: int | None) -> Partial:
        shared, size = self.lent(query), min(self.size, SLOT_BLOCK)
        valid = self.there(shared)

        def rebuilt(x: Float[Array, "B 1 m R"], basis: Float[Array, "B K D R"]) -> Float[Array, "B K m D"]:
            exact = "highest" if x.dtype == jnp.float32 else None
            return jnp.einsum("bmr,bkdr->bkmd", x[:, 0], basis, precision=exact).astype(x.dtype)

        def block(index: Array | int, part: Partial) -> Partial:
            # the last block is moved back to fit; slots that the block before it had are masked
            start = jnp.minimum(index * size, self.size - size)
            k, v, position, there = (
                jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in (shared.k, shared.v, shared.position, valid)
            )
            keys = rebuilt(k, state.k)
            keys = keys if query.rotary is None else query.rotary.moved(keys, position)
            fresh = start + jnp.arange(size) >= index * size
            return merge(part, query.attend(keys, rebuilt(v, state.v), position, there & fresh))

        used = self.size if query.differentiable else jnp.max(shared.count)
        return jax.lax.fori_loop(0, (used + size - 1) // size, block, query.nothing())
