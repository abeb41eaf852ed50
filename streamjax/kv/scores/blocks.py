"""Blocks of tokens that came one behind the other: what is compared with the next block."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.scores.score import Held


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Slots in the order of the stream, cut into blocks of `size` that begin with the first token that competes.

    What stays in front, such as sinks, is in none of them: it comes behind the last token.
    """

    first: Int32[Array, "B #K 1"]
    slots: int
    size: int

    @classmethod
    def of(cls, held: Held, size: int) -> Blocks:
        """Of tokens that lie in the order of the stream."""
        return cls(jnp.argmax(held.valid, axis=2, keepdims=True), held.k.shape[2], size)

    @property
    def count(self) -> int:
        return -(-self.slots // self.size)

    def cut(self, x: Array) -> Array:
        """[B, K, S, ...] as blocks [B n, K, size, ...], with zeros behind the last slot."""
        x = _moved(x, jnp.arange(self.slots) + self.first)
        x = jnp.pad(x, [(0, self.count * self.size - self.slots if axis == 2 else 0) for axis in range(x.ndim)])
        return rearrange(x, "b k (n s) ... -> (b n) k s ...", n=self.count)

    def following(self, x: Array) -> Array:
        """Of each block [B n, ...] what belongs to the next one; zeros for the last."""
        whole = rearrange(x, "(b n) ... -> b n ...", n=self.count)
        shifted = jnp.concatenate((whole[:, 1:], jnp.zeros_like(whole[:, :1])), axis=1)
        return rearrange(shifted, "b n ... -> (b n) ...")

    def joined(self, x: Float[Array, "N K C"]) -> Float[Array, "B K S"]:
        """Numbers of blocks' tokens, back where the tokens lie."""
        whole = rearrange(x, "(b n) k s -> b k (n s)", n=self.count)[:, :, : self.slots]
        return _moved(whole, jnp.arange(self.slots) - self.first)


def next_is_whole(blocks: Blocks, there: Bool[Array, "N K C"]) -> Bool[Array, "N K 1"]:
    """Whether a token lies in every place of the next block."""
    return blocks.following(there).all(axis=2, keepdims=True)


def _moved(x: Array, index: Int32[Array, "B #K S"]) -> Array:
    """`x` [B, K, S, ...] with its places along S taken from `index`, modulo S."""
    index = jnp.broadcast_to(index % index.shape[2], (*x.shape[:2], index.shape[2]))
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=2)
