"""What of a long text a drafter reads: the chunks that have most to do with its newest tokens.

RAPID (2502.20330) drafts from a text that retrieval has shortened. It ranks chunks by a text embedder of its own; here
they are ranked by the ids that they share with the question (BM25: Robertson and Zaragoza, "The Probabilistic Relevance
Framework", 2009, equation 3.15), which needs no other model. RAPID also lets the drafter change what the model says;
here it only guesses.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Int32

from streamjax.field_checks import Size, check_fields

_SATURATION, _LENGTHS = 1.2, 0.75  # k1 and b, as is usual


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Chunks of what a stream has read.

    Args:
      chunks: how many are taken.
      size: tokens of each.
      asked: newest tokens that are the question.

    Example:
      >>> Retrieval(chunks=1, size=4, asked=2).read([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 6, 7], newest=2)
      array([5, 6, 7, 8, 6, 7], dtype=int32)
    """

    chunks: Size = 8
    size: Size = 64
    asked: Size = 64

    def __post_init__(self) -> None:
        check_fields(self)

    def read(self, tokens: Int[np.ndarray, " T"] | list[int], newest: int) -> Int32[np.ndarray, " N"]:
        """The best chunks of a text in their order, and behind them its `newest` tokens, which no chunk has."""
        whole = np.asarray(tokens, np.int32)
        old, new = whole[: max(len(whole) - newest, 0)], whole[max(len(whole) - newest, 0) :]
        chunks = [old[start : start + self.size] for start in range(0, len(old), self.size)]
        scores = relevance(chunks, whole[-self.asked :])
        best = np.sort(np.argsort(-scores, kind="stable")[: self.chunks])
        return np.concatenate([*(chunks[i] for i in best if scores[i] > 0), new])


def relevance(chunks: list[Int32[np.ndarray, " S"]], question: Int32[np.ndarray, " Q"]) -> Float[np.ndarray, " N"]:
    """BM25 of each chunk: ids that the question has too count, rare ones more, and less each time that they return."""
    scores = np.zeros(len(chunks))
    mean = sum(map(len, chunks)) / max(len(chunks), 1)
    for token in np.unique(question):
        often = np.array([np.count_nonzero(chunk == token) for chunk in chunks])
        having = np.count_nonzero(often)
        if having:
            rarity = np.log1p((len(chunks) - having + 0.5) / (having + 0.5))
            lengths = 1 - _LENGTHS + _LENGTHS * np.array([len(chunk) for chunk in chunks]) / mean
            scores += rarity * often * (_SATURATION + 1) / (often + _SATURATION * lengths)
    return scores
