"""`BasisSlots`: keys or values of all heads together as coordinates in a basis, which lies beside them.

The keys of a layer, [T, K, D] before rotation, are T vectors of K D channels. In an orthonormal basis of R < K D of
them they take R numbers a token, wherever the basis comes from: it was measured with the model, or it is the one that
fits the stream's first tokens best. Slots hold R / K numbers of each token in the place of each head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from streamjax.field_checks import Size
from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.grouped import GroupedSlots


@dataclasses.dataclass(frozen=True)
class Coordinates(Codec):
    """`kept` numbers of a token and head, in the dtype of what is stored; `group` tokens become coordinates together.

    What the numbers are is for the slots to know.
    """

    kept: Size
    group: Size = 1

    @property
    def tokens(self) -> int:
        return self.group

    def check(self, head_dim: int) -> None:
        if self.kept > head_dim:
            raise ValueError(f"a basis has {self.kept} directions a head, and heads have {head_dim} channels")

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        return x[..., : self.kept], ()

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        return codes[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeSlots(GroupedSlots):
    """Keys or values as they are, of tokens that become visible a group at a time."""

    def decoded(self, codes: Codes, dtype: DTypeLike | None = None) -> Float[Array, "B K N G D"]:
        return codes[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BasisSlots(GroupedSlots):
    """basis: orthonormal directions of all heads' channels. known: whether there is one yet; the first group makes it
    otherwise. fits: whether that can happen (static)."""

    basis: Float[Array, "B K D R"] | None = None
    known: Bool[Array, " B"] | None = None
    fits: bool = dataclasses.field(default=False, metadata={"static": True})

    def with_basis(self, basis: Float[Array, "#B K D R"], known: Bool[Array, " B"], fits: bool) -> BasisSlots:
        """These slots and a basis, which is one where it is known."""
        basis = jnp.broadcast_to(basis, (self.codes.shape[0], *basis.shape[1:])).astype(self.dtype)
        return dataclasses.replace(self, basis=basis, known=known, fits=fits)

    def fitted(self, x: Float[Array, "B K T D"], valid: Bool[Array, "B T"], rows: Bool[Array, " B"]) -> BasisSlots:
        """With the basis of some rows that fits these tokens best."""
        assert self.basis is not None
        assert self.known is not None
        made = best_basis(x, valid, self.basis.shape[3]).astype(self.dtype)
        basis = jnp.where(rows[:, None, None, None], made, self.basis)
        return dataclasses.replace(self, basis=basis, known=self.known | rows)

    def write(self, chunk: Float[Array, "B K C D"], start: Int32[Array, " B"], count: Int32[Array, " B"]) -> BasisSlots:
        if not self.fits:
            return super().write(chunk, start, count)  # type: ignore[return-value]
        assert self.known is not None
        rows = ~self.known & (self.count + count >= self.codec.tokens)

        def fit(tail: Array, chunk: Array) -> Array:
            index = jnp.arange(self.codec.tokens, dtype=jnp.int32)[None]
            waited = index < self.count[:, None]
            old = (self.place[:, None] - self.count[:, None] + index) % tail.shape[2]
            new = jnp.clip(start[:, None] + index - self.count[:, None], 0, chunk.shape[2] - 1)
            first = jnp.where(
                waited[:, None, :, None],
                jnp.take_along_axis(tail, old[:, None, :, None], axis=2),
                jnp.take_along_axis(chunk.astype(tail.dtype), new[:, None, :, None], axis=2),
            )
            basis = self.fitted(first, jnp.ones(waited.shape, bool), rows).basis
            assert basis is not None
            return basis

        basis = jax.lax.cond(rows.any(), fit, lambda *_: self.basis, self.tail, chunk)
        return super(BasisSlots, dataclasses.replace(self, basis=basis, known=self.known | rows)).write(
            chunk, start, count
        )  # type: ignore[return-value]

    def _packed(self, groups: Float[Array, "B K N G D"]) -> Codes:
        together = jnp.einsum("bkngd,bkdr->bngr", groups, self.basis, precision=_exact(groups))
        return rearrange(together.astype(groups.dtype), "b n g (k c) -> b k n g c", k=groups.shape[1]), ()

    def decoded(self, codes: Codes, dtype: DTypeLike | None = None) -> Float[Array, "B K N G D"]:
        assert self.basis is not None
        return rebuilt(codes[0], self.basis)


def rebuilt(codes: Float[Array, "B K N G c"], basis: Float[Array, "B K D R"]) -> Float[Array, "B K N G D"]:
    """Keys or values of which these are the coordinates."""
    together = rearrange(codes, "b k n g c -> b n g (k c)")
    return jnp.einsum("bngr,bkdr->bkngd", together, basis, precision=_exact(codes)).astype(codes.dtype)


def best_basis(x: Float[Array, "B K T D"], valid: Bool[Array, "B T"], rank: int) -> Float[Array, "B K D R"]:
    """The directions of all heads' channels that hold most of these tokens' squares: right singular vectors."""
    heads = x.shape[1]
    line = rearrange(jax.lax.stop_gradient(x), "b k t d -> b t (k d)").astype(jnp.float32)
    line = line * valid[..., None]
    squares = jnp.einsum("btm,btn->bmn", line, line, precision="highest")
    _, directions = jnp.linalg.eigh(squares)  # the least first
    return rearrange(directions[:, :, ::-1][:, :, :rank], "b (k d) r -> b k d r", k=heads)


def _exact(x: Array) -> str | None:
    return "highest" if x.dtype == jnp.float32 else None
