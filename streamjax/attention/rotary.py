"""Rotation of queries and keys by a uint32 fixed-point phase, exact at any distance from the start of a stream.

RoPE (Su et al., 2104.09864) turns channel pair d of a vector at position p by the angle `p * frequency[d]`. In float32
that angle loses its meaning after some millions of tokens. Here a whole turn is 2^32: a frequency is an integer step
`round(2^32 * frequency / 2 pi)`, the phase `p * step` wraps modulo one turn as uint32 arithmetic does by itself, and
only the wrapped phase becomes a float. The phase difference between two positions is exact whatever the positions are,
across the wrap of the position counter too. Channel pairs are (d, d + rotary_dim / 2), Hugging Face's layout.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from pallas_kernels.partial import accumulator
from streamjax.barriers import materialized_once

MANY = 32  # tokens from which the tables are computed once, and not in every head


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A rotation: `steps` are 2^32ths of a turn per position, one a channel pair; `scale` multiplies what rotates.

    Static and hashable. `scale` is YaRN's and LongRoPE's attention factor: it applies to the rotated channels of
    queries and keys alike, as in the published implementations.
    """

    steps: tuple[int, ...]
    scale: float = 1.0

    @classmethod
    def from_frequencies(cls, frequencies: np.ndarray, scale: float = 1.0) -> Rotary:
        """From angular frequencies in radians per position (float64)."""
        steps = np.round(np.asarray(frequencies, np.float64) * (2.0**32 / (2.0 * np.pi))).astype(np.uint64)
        return cls(tuple(int(step % 2**32) for step in steps), float(scale))

    def table(self, position: UInt32[Array, "..."]) -> tuple[Float[Array, "... R"], Float[Array, "... R"]]:
        """Cosine and sine of the phase at each position, float32, R = len(steps), the scale included."""
        phase = position[..., None].astype(jnp.uint32) * jnp.asarray(np.array(self.steps, np.uint32))
        angle = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2.0 * np.pi / 2.0**32)
        return jnp.cos(angle) * self.scale, jnp.sin(angle) * self.scale

    def __call__(self, x: Float[Array, "B T H D"], position: UInt32[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Rotate the first `2 * len(steps)` channels of `x` to `position`; the others pass unchanged."""
        tables = self.table(position)
        if position.shape[1] >= MANY:
            tables = materialized_once(tables, (position >> 1).astype(jnp.int32))
        cos, sin = tables
        return rotate(x, cos[:, :, None], sin[:, :, None])

    def moved(self, k: Float[Array, "B K S D"], by: UInt32[Array, "B #K S"]) -> Float[Array, "B K S D"]:
        """Cached keys, heads first, turned on by so many positions (modulo 2^32); `scale` is in them already."""
        return rotate(k, *dataclasses.replace(self, scale=1.0).table(by))

    def back(self, k: Float[Array, "B K S D"], position: UInt32[Array, "B #K S"]) -> Float[Array, "B K S D"]:
        """Cached keys at these positions as they were before rotation, `scale` taken out."""
        back, turned = self.moved(k, -position), 2 * len(self.steps)
        return jnp.concatenate((back[..., :turned] / self.scale, back[..., turned:]), axis=-1).astype(k.dtype)


def rotate(x: Float[Array, "... D"], cos: Float[Array, "... R"], sin: Float[Array, "... R"]) -> Float[Array, "... D"]:
    """Rotate channel pairs (d, d + R) for d < R by a cosine and sine table, in float32; dtype of `x` is kept."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    dtype = accumulator(x.dtype)
    first, second, cos, sin = (part.astype(dtype) for part in (first, second, cos, sin))
    turned = (first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)
    return jnp.concatenate((*turned, rest) if rest.shape[-1] else turned, axis=-1)
