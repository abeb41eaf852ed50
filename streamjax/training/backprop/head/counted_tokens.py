"""Which tokens the head projects, and in which blocks: those that count, packed, and no others.

Of a conversation the assistant's tokens count, of a preference pair the answers', of a padded row all but the padding.
Logits of other tokens have no part in the loss. So the hidden states of tokens that count are taken one after another
from wherever they stand, in blocks of one size, and the loop over blocks ends behind the last one that holds any. No
shape depends on the data, and nothing is copied but the block at hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int32

from streamjax.attention.block_cutting import even_size
from streamjax.parallel.rules import STAGE

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class TokenBlocks:
    """Blocks of R x S tokens of arrays [N, B, C, ...].

    Where it is known which tokens count, R is 1. Else all of them are projected, R is B, and rows stay apart.

    index: flat numbers of tokens; a place without a token has a number behind the last one. used: how many blocks hold
    tokens. shape: N, B, C.

    Example:
      >>> counted = jnp.array([[[False, True, False], [True, True, False]]])
      >>> index = jax.jit(lambda counted: TokenBlocks.of(counted, (1, 2, 3), 2).index)(counted)
      >>> index.tolist()  # blocks of two tokens of both rows; used: 1
      [[[1, 3, 4, 9]], [[10, 11, 12, 13]]]
    """

    index: Int32[Array, "blocks R S"]
    used: Int32[Array, ""] | int
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, counted: Bool[Array, "N B C"] | None, shape: tuple[int, int, int], most: int) -> TokenBlocks:
        """Blocks of at most `most` tokens of a row, or of as many of any rows.

        On a mesh that leaves axes to the compiler, devices that have tokens of their own go through as many blocks as
        each other: what the compiler sends within a block may be one instruction for all of them.
        """
        total, (_, rows, length) = math.prod(shape), shape
        size = even_size(length, most)
        if counted is None:
            numbers = jnp.arange(total, dtype=jnp.int32).reshape(shape)
            padded = jnp.pad(numbers, ((0, 0), (0, 0), (0, -length % size)), constant_values=total)
            index = rearrange(padded, "n b (m s) -> (n m) b s", s=size)
            return cls(index, index.shape[0], shape)
        size *= rows
        blocks = -(-total // size)
        places, flat = jnp.arange(blocks * size, dtype=jnp.int32), counted.reshape(-1)
        first = jnp.pad(jnp.argsort(~flat, stable=True).astype(jnp.int32), (0, blocks * size - total))
        count = jnp.sum(flat, dtype=jnp.int32)
        index = jnp.where(places < count, first, total + places)
        return cls(index.reshape(blocks, 1, size), _agreed(-(-count // size)), shape)

    def flat(self, x: Array) -> Array:
        """An array [N, B, C, ...] as one row of tokens: a loop that carries it so takes from it and puts into it in
        place."""
        return x.reshape(math.prod(self.shape), *x.shape[3:])

    def take(self, x: Array, i: Any) -> Array:
        """Block i of a `flat` array as [R, S, ...]; zeros in places without a token."""
        return x.at[self._block(i)].get(mode="fill", fill_value=0)

    def put(self, x: Array, i: Any, new: Array) -> Array:
        """A `flat` array with block i, [R, S, ...], in the places of its tokens."""
        return x.at[self._block(i)].set(new.astype(x.dtype), mode="drop")

    def loop(self, body: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
        """`carry = body(i, carry)` for the blocks that hold tokens."""
        if self.index.shape[0] == 1 and isinstance(self.used, int):
            return body(0, carry)
        return jax.lax.fori_loop(0, self.used, body, carry)

    def _block(self, i: Any) -> Int32[Array, "R S"]:
        return jax.lax.dynamic_index_in_dim(self.index, i, keepdims=False)


def _agreed(blocks: Int32[Array, ""]) -> Int32[Array, ""]:
    """The most blocks that any device has, where not all axes of the mesh are taken by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    by_hand = tuple(axis for axis in mesh.manual_axes if axis != STAGE)  # of stages the last one alone has a head
    others = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1]
    return jax.lax.pmax(blocks, by_hand) if by_hand and others else blocks
