"""`MeanAttention`: what a query that sees a token gives to it, on average (ZipCache, He et al., 2405.14256)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class MeanAttention(Score):
    """H2O's sum over the queries that have seen the token: early tokens, which many have, are not better for that."""

    needs_attention: ClassVar[bool] = True

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        seen = held.now[:, None, None] - held.position
        return held.noted / seen.astype(held.noted.dtype)
