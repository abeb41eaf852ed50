"""`H2O`: the attention that a token has got from all queries so far (Zhang et al., 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class H2O(Score):
    """The sum of a token's attention, its own query's included. Query heads that share a key head vote together."""

    needs_attention: ClassVar[bool] = True

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        assert held.note is not None
        return held.note
