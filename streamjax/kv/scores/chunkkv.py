"""`ChunkKV`: chunks of neighbouring tokens stay or go as a whole (Liu et al., 2502.00299)."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from streamjax.field_checks import Size
from streamjax.kv.scores.score import Held
from streamjax.kv.scores.stretches import over_stretches
from streamjax.kv.scores.wrapped import Wrapped


@dataclasses.dataclass(frozen=True)
class ChunkKV(Wrapped):
    """The mean that `score` says of a token's chunk: the `chunk` positions from a multiple of `chunk` on.

    The chunk that the last place falls to is cut: its newest tokens stay. A `size` that is a multiple keeps whole ones.
    """

    chunk: Size = 10

    def check(self, every: int) -> None:
        super().check(every)
        if every % self.chunk:
            raise ValueError(f"ChunkKV.chunk is {self.chunk}, but the tier makes room after every {every} tokens: "
                             "it must be a multiple, so that chunks are whole when they are judged")  # fmt: skip

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        total, count = over_stretches(self.score.rank(held), held, self.chunk)
        return total / count.clip(1)
