"""`Hadamard`: channels are transformed before they are coded, so that none is much larger than the others.

Keys have channels that are large in every token. A codec by token has one step for them and for all the small ones,
which it rounds away; those that code by channel need groups of neighbouring tokens, which a tier that chooses tokens
does not have. Multiplied by a Hadamard matrix each number has a part of every channel, and the matrix is its own
inverse (QuaRot, Ashkboos et al., arXiv 2404.00456, for keys and values; RotateKV, 2501.16383, for two bits). There
queries and outputs are multiplied instead of what is read, which is the same and cheaper.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import hadamard

from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.integers import Int, IntByToken


@dataclasses.dataclass(frozen=True)
class Hadamard(Codec):
    """`Int`'s codes of transformed channels, token by token: in parts of the largest power of two that divides them.

    Any tier can store by it. XLA reads these codes; decoding kernels do not.

    Args:
      codec: its bits, its fit, and as its group the channels of a token that share a step.
    """

    codec: Int = dataclasses.field(default_factory=lambda: Int(4, fit="error"))

    @property
    def inner(self) -> IntByToken:
        return IntByToken(self.codec.bits, self.codec.group, self.codec.fit)

    @property
    def bits(self) -> int:
        return self.codec.bits

    def one_by_one(self) -> Codec:
        return self

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        return self.inner.encode(transformed(x.astype(jnp.float32)), role)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        found = self.inner.decode(codes, role)
        return jnp.einsum("bkngd,de->bknge", found, matrix(found.shape[-1]), precision="highest")


def transformed(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The channels times the matrix, by sums of pairs: in an order that no compiler changes, so codes are the same."""
    width = x.shape[-1] & -x.shape[-1]
    y, size = x.reshape(-1, width), 1
    while size < width:
        first, second = jnp.moveaxis(y.reshape(len(y), -1, 2, size), 2, 0)
        y, size = jnp.stack((first + second, first - second), axis=2).reshape(y.shape), 2 * size
    return (y * np.float32(width**-0.5)).reshape(x.shape)


def matrix(channels: int) -> Float[np.ndarray, "D D"]:
    """Sylvester's matrix, with rows of length 1, for each of the largest parts whose width is a power of two.

    >>> np.round(matrix(2) * 2**0.5)
    array([[ 1.,  1.],
           [ 1., -1.]], dtype=float32)
    """
    width = channels & -channels
    return np.kron(np.eye(channels // width), hadamard(width) * width**-0.5).astype(np.float32)
