"""`Gear`: few bits, and beside them what they miss: a part of low rank and single numbers (GEAR, arXiv 2403.05527)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.coded import Coded
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.codecs.codec import Codes, GroupedCodec, Role
from streamjax.kv.codecs.integers import Bits, FewChannels, Fit, Int

_ROUNDS = 3  # of subspace iteration


@dataclasses.dataclass(frozen=True)
class Gear(GroupedCodec):
    """`Int`'s codes of a group of tokens, and two corrections of what they leave.

    Of each token the `outliers` numbers that its codes miss most are kept as they are, in bfloat16 with a byte for the
    channel. What is left then of a group's tokens [G, D] is replaced by its best product of factors [G, rank] and
    [rank, D]. The published rule takes outliers out before it codes, the greatest and least of each channel of keys and
    of each token's values, so that they do not stretch the range; here `fit` cuts the range.

    Codes depend on a group's tokens alone, bit for bit. Factors are sums of products, whose last bits are the
    compiler's.

    Args:
      bits, group, residual, fit: as in `Int`.
      rank: of the factors; none where 0.
      outliers: numbers of each token and head.

    Raises:
      ValueError: a residual that is no multiple of the group, or a rank of more than a group has tokens.
    """

    bits: Bits = 2  # type: ignore[assignment]
    group: Size = 64
    residual: Count = 0
    rank: FewChannels = 2
    outliers: FewChannels = 1
    fit: Fit = "error"

    def __post_init__(self) -> None:
        check_fields(self)
        assert self.base.tokens == self.group
        if self.rank > self.group:
            raise ValueError(f"Gear.rank is {self.rank}, but a group has {self.group} tokens")

    @property
    def base(self) -> Int:
        """What codes."""
        return Int(self.bits, group=self.group, residual=self.residual, fit=self.fit)

    def check(self, head_dim: int) -> None:
        """Raise a ValueError where heads are narrower than what is kept of them, or their channels exceed a byte."""
        if head_dim > 256 or head_dim < max(self.rank, self.outliers):
            raise ValueError(f"{self!r} stores heads of {max(self.rank, self.outliers, 1)} to 256, not {head_dim}")

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        least, step, *more = numbers
        kept, channels = more[:2] if self.outliers else (None, None)
        tokens, flat = more[-2:] if self.rank else (None, None)
        return Coded(
            codes, least, step, self.bits, self.group, self.base.along(role),
            tokens=tokens, directions=flat, kept=kept, channels=channels,
        )  # fmt: skip

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        codes, numbers = self.base.encode(x, role)
        left = x.astype(jnp.float32) - self.base.decode((codes, numbers), role)
        if self.outliers:
            _, channels = jax.lax.top_k(jnp.abs(left), self.outliers)
            kept = jnp.take_along_axis(x, channels, axis=-1).astype(jnp.bfloat16)
            left = jnp.where(_marked(channels, x.shape[-1]).any(axis=-2), 0.0, left)
            numbers = (*numbers, kept, channels.astype(jnp.uint8))
        if self.rank:
            tokens, directions = low_rank(left, self.rank)
            flat = directions.reshape(*directions.shape[:3], 1, -1)
            numbers = (*numbers, tokens.astype(jnp.bfloat16), flat.astype(jnp.bfloat16))
        return codes, numbers

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        whole, (least, step, *more) = codes
        found = self.base.decode((whole, (least, step)), role)
        if self.rank:
            tokens, flat = more[-2:]
            directions = flat.reshape(*flat.shape[:3], self.rank, -1).astype(jnp.float32)
            found = found + jnp.einsum("bkngr,bknrd->bkngd", tokens.astype(jnp.float32), directions)
        if self.outliers:
            kept, channels = more[:2]
            marked = _marked(channels, found.shape[-1])
            found = jnp.where(marked.any(-2), jnp.sum(jnp.where(marked, kept[..., None], 0), axis=-2), found)
        return found.astype(jnp.float32)


def _marked(channels: Array, width: int) -> Array:
    """[..., n] numbers of channels as [..., n, width], true at each."""
    return channels[..., None].astype(jnp.int32) == jnp.arange(width)


def low_rank(x: Float[Array, "... G D"], rank: int) -> tuple[Float[Array, "... G r"], Float[Array, "... r D"]]:
    """Factors whose product is near the best of this rank, by subspace iteration from fixed directions."""
    start = jnp.cos(jnp.arange(1.0, x.shape[-1] + 1)[:, None] * jnp.arange(1.0, rank + 1))
    tokens = x @ start
    for _ in range(_ROUNDS):
        tokens = x @ (jnp.swapaxes(x, -1, -2) @ jnp.linalg.qr(tokens)[0])
    tokens = jnp.linalg.qr(tokens)[0]
    return tokens, jnp.swapaxes(tokens, -1, -2) @ x
