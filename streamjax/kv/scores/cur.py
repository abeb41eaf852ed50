"""`CUR`: tokens whose keys and values are long beside those of their neighbours (CurDKV, 2509.15038)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Size
from streamjax.kv.scores.score import Held, Score
from streamjax.kv.scores.stretches import over_stretches


@dataclasses.dataclass(frozen=True)
class CUR(Score):
    """The squared length of a key by the mean of its neighbours', times the same of the value.

    Squared lengths stand for leverage scores of rows, as in kvpress. Neighbours are the `local` positions from a
    multiple of `local` on; where all are there, the order is that of shares of their sum. In a stream a token is judged
    once, beside all that have come with it, and that is remembered: later its neighbours may be gone.

    by: "product" of both, their "mean", or one alone.
    """

    remembers: ClassVar[bool] = True

    local: Size = 16
    by: Literal["product", "mean", "keys", "values"] = "product"

    def check(self, every: int) -> None:
        if every % self.local:
            raise ValueError(f"CUR.local is {self.local}, but the tier makes room after every {every} tokens: it must "
                             "be a multiple, so that tokens are judged beside all of their neighbours")  # fmt: skip

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        judged = self.rank_all(held._replace(valid=held.fresh))
        least = jnp.finfo(judged.dtype).tiny  # 0 would be a new token
        return jnp.where(held.fresh, jnp.maximum(judged, least), held.noted)

    def rank_all(self, held: Held) -> Float[Array, "B K S"]:
        of_keys, of_values = (self._by_mean(x, held) for x in (held.k, held.values))
        match self.by:
            case "keys":
                return of_keys
            case "values":
                return of_values
            case "mean":
                return (of_keys + of_values) / 2
        return of_keys * of_values

    def _by_mean(self, x: Float[Array, "B K S D"], held: Held) -> Float[Array, "B K S"]:
        squared = jnp.sum(jnp.square(x.astype(accumulator(x.dtype))), axis=-1)
        total, count = over_stretches(squared, held, self.local)
        return squared * count / jnp.where(total > 0, total, 1.0)
