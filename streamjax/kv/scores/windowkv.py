"""`WindowKV`: short windows of the text by the best of their tokens (Zuo et al., 2503.17922)."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from streamjax.field_checks import Size
from streamjax.kv.scores.score import Held
from streamjax.kv.scores.stretches import over_stretches
from streamjax.kv.scores.wrapped import Wrapped


@dataclasses.dataclass(frozen=True)
class WindowKV(Wrapped):
    """The mean that `score` says of the `best` tokens in the token's window of `length` positions.

    The paper has two rules: half of a window's tokens speak for it where a question looks for something (`best` is
    half of `length`), all of them where a text is to be summed up (`best` is `length`).
    """

    length: Size = 8
    best: Size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best > self.length:
            raise ValueError(f"WindowKV.best is {self.best}, but a window has {self.length} tokens")

    def check(self, every: int) -> None:
        super().check(every)
        if every % self.length:
            raise ValueError(f"WindowKV.length is {self.length}, but the tier makes room after every {every} tokens: "
                             "it must be a multiple, so that windows are whole when they are judged")  # fmt: skip

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        total, count = over_stretches(self.score.rank(held), held, self.length, self.best)
        return total / count.clip(1)
