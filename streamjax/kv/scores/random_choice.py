"""`RandomChoice`: tokens stay by the draw, the baseline of every score."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from streamjax.field_checks import Size
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class RandomChoice(Score):
    """A number in [0, 1) for each position and key head, the same at every look: a hash of them and of the seed."""

    seed: Size = 1

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        return hashed(jnp.broadcast_to(held.position, held.k.shape[:3]), self.seed)


def hashed(position: UInt32[Array, "B K S"], seed: int) -> Float[Array, "B K S"]:
    """A number in [0, 1) for each position and key head."""
    head = jnp.arange(position.shape[1], dtype=jnp.uint32)[:, None]
    mixed = _mixed(position ^ _mixed(head + jnp.uint32(seed * 0x9E3779B9 % 2**32)))
    return (mixed >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Murmur3's last step: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
