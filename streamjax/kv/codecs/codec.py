"""What a codec is: tokens in groups become codes and a few numbers that say what the codes mean, and come back.

A codec is a frozen dataclass, static and hashable. It knows no slots: what waits until a group is full, what is packed
into bytes and where it lies is the business of what stores by it (`grouped.py`, `slotwise.py`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels.coded import Coded
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.field_checks import check_fields

Role = Literal["k", "v"]
LISTED = 64  # slots that kernels take for a group where each token is coded by itself
Codes = tuple[Shaped[Array, "..."], tuple[Shaped[Array, "..."], ...]]  # [B, K, N, G, c], each [B, K, N, 1 or G, e]


class Codec:
    """How groups of `group` tokens are stored. Subclasses are frozen dataclasses whose fields `check_fields` can check.

    `encode` gives codes, one place a token, and further numbers, of which there is one place a token or one a group.
    `decode` gets the same of some of a group's tokens. Whatever a code says has to be exact in float32 before the last
    rounding, so that no compiler's choice of instructions changes a bit of it.

    A codec that was measured with a model has `tables` of each layer. They are data: they lie in the state, beside the
    slots, and `encode` and `decode` are given them; the program knows the codec without them (`without_numbers`), one
    for all layers.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def bits(self) -> int:
        """Bits of a code: 8, or 4, 2 or 1, of which several share a byte."""
        return 8

    @property
    def tokens(self) -> int:
        """How many tokens are coded together."""
        return 1

    @property
    def waiting(self) -> int:
        """Newest tokens that stay in full precision, beside those whose group is not full yet."""
        return 0

    @property
    def unrotated(self) -> bool:
        """Whether keys are coded as they were before rotation. Tiers that can then turn them when they are read."""
        return False

    @property
    def made_for(self) -> str | None:
        """A fingerprint of the model that it was measured with; None where it serves every model."""
        return None

    def without_numbers(self) -> Codec:
        """The same without its tables."""
        return self

    def table_shapes(self, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what `tables` has of one head of this width."""
        return ()

    def tables(self, role: Role, heads: int, width: int) -> tuple[Shaped[np.ndarray, "K ..."], ...]:
        """What was measured of the keys or values of a layer, for each head.

        Raises:
          ValueError: nothing was, or of another layer.
        """
        return ()

    def check(self, head_dim: int) -> None:
        """Raise a ValueError where heads are not of a width that this codec can store."""

    def one_by_one(self) -> Codec:
        """The codec for tiers that overwrite single tokens, whose codes depend on no other token.

        Raises:
          ValueError: there is none.
        """
        raise ValueError(f"{self!r} codes tokens in groups: a tier that chooses tokens cannot store by it")

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | Unpackable | None:
        """All slots of groups as the decoding kernels read them; None where they do not.

        A codec whose codes `Coded` has no words for brings an `Unpacking`. Unrotated keys get their positions later.
        """
        return None

    def turned(self, keys: Coded | Unpackable, position: UInt32[Array, "B #K S"], steps: tuple[int, ...]) -> Unpackable:
        """Unrotated keys that a kernel turns to their positions; steps: 2^32ths of a turn, of each channel pair."""
        raise NotImplementedError

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Shaped[Array, "B K ..."]) -> Codes:
        """N groups of keys or of values as codes."""
        raise NotImplementedError

    def decode(self, codes: Codes, role: Role, *tables: Shaped[Array, "B K ..."]) -> Float[Array, "B K N G D"]:
        """What codes say, in float32."""
        raise NotImplementedError


class GroupedCodec(Codec):
    """A codec of `group` tokens at a time that leaves the newest `residual` in full precision: fields of a subclass."""

    group: int
    residual: int

    @property
    def tokens(self) -> int:
        return self.group

    @property
    def waiting(self) -> int:
        return self.residual

    def check_groups(self) -> None:
        """Raise a ValueError where codes of a group fill no whole bytes, or the residual is no multiple of it."""
        if self.residual % self.group or self.group % (8 // self.bits):
            fits = f"a multiple of {8 // self.bits}, and the residual one of the group"
            name = type(self).__name__
            raise ValueError(f"{name}.group is {self.group}, the residual {self.residual}: the group is {fits}")


def bytes_per_token(codec: Codec, head_dim: int, value_dim: int | None = None) -> float:
    """Bytes of a stored token's key and value in one head, as they are allocated.

    >>> from streamjax.kv.codecs.integers import Int
    >>> bytes_per_token(Int(bits=4, group=64), head_dim=64)
    72.0
    """
    total = 0.0
    for role, width in (("k", head_dim), ("v", head_dim if value_dim is None else value_dim)):
        if width:
            codes, numbers = shapes(codec, role, width)  # type: ignore[arg-type]
            total += math.prod(codes.shape) * codes.dtype.itemsize * codec.bits / 8
            total += sum(math.prod(x.shape) * x.dtype.itemsize for x in numbers)
    return total / codec.tokens


def shapes(codec: Codec, role: Role, width: int, dtype: DTypeLike = jnp.float32) -> Any:
    """The shapes of one group's codes and numbers, in one head: traced once, and asked for by every layer."""
    return _shapes(codec, role, width, np.dtype(dtype))


@lru_cache(maxsize=1024)
def _shapes(codec: Codec, role: Role, width: int, dtype: np.dtype) -> Any:
    group = jax.ShapeDtypeStruct((1, 1, 1, codec.tokens, width), dtype)
    tables = [jnp.zeros((1, 1, *x.shape), x.dtype) for x in codec.table_shapes(width)]
    return jax.eval_shape(lambda x: codec.encode(x, role, *tables), group)
