"""What a drafter is: whoever guesses how streams go on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Size, check_fields
from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.history import History


@dataclasses.dataclass(frozen=True)
class Draws:
    """How each stream's next tokens will be chosen: by whom, with which key, and which number its next draw has.

    A drafter that draws by it meets the same random numbers as the model that verifies, and so agrees most often.
    `hidden` is the model's state behind the newest token that each stream has read: what chose its newest token.
    `ahead` are its states at the drafter's prompt tokens behind that one, where the last pass has read them.
    """

    sampler: Sampler
    key: Array | None
    index: Int32[np.ndarray, " B"]
    hidden: Float[Array, "B E"]
    ahead: Float[Array, "B M E"] | None = None


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Guesses for B streams: `count[b]` of the tokens of row b, 0 where the drafter has no idea.

    They follow each other, or are a tree: `parents[b, i]` says which token guess i follows, 0 for the stream's newest
    one, j + 1 for guess j, which comes before i. Two ways to go on, "a b" and "c", are the tokens [a, b, c] with the
    parents [0, 1, 0]. Of guesses with one parent the likelier comes first, and no two of them are the same token.
    """

    tokens: Int32[np.ndarray, "B K"]
    count: Int32[np.ndarray, " B"]
    parents: Int32[np.ndarray, "B K"] | None = None

    def first_ways(self, width: int) -> Drafts:
        """Of trees, in each row the way that always goes on with the first guess, `width` tokens of it at most."""
        if self.parents is None:
            return self
        tokens, count = np.zeros((len(self.tokens), width), np.int32), np.zeros_like(self.count)
        for row, (own, parents, some) in enumerate(zip(self.tokens, self.parents, self.count, strict=True)):
            at = 0
            for i in range(some):
                if parents[i] == at and count[row] < width:
                    tokens[row, count[row]] = own[i]
                    count[row] += 1
                    at = i + 1
        return Drafts(tokens, count)


@dataclasses.dataclass
class Drafter:
    """Guesses how streams go on. Whatever it says, what is generated is the same: only how fast depends on it.

    Args:
      length: tokens that it guesses at most of one way to go on, K; a pass then reads up to K + 1.
    """

    length: Size = 7

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def nodes(self) -> int:
        """How many tokens it guesses at most of a stream: more than `length` where it guesses several ways to go on."""
        return self.length

    @property
    def pass_width(self) -> int:
        """How many tokens of a stream a pass reads that has guesses."""
        return 1 + self.nodes

    @property
    def prompts(self) -> Float[Array, "M E"] | None:
        """Embeddings of prompt tokens that the model is to read behind each node of its trees; None: there are none."""
        return None

    @property
    def guesses_trees(self) -> bool:
        """Whether its guesses may be a tree."""
        return False

    def smaller(self) -> Drafter | None:
        """The same with fewer guesses, to save memory; None: it guesses a single token."""
        return None if self.length == 1 else self._with(length=self.length - 1)

    def _with(self, **values: int) -> Drafter:
        one = copy.copy(self)
        for name, value in values.items():
            setattr(one, name, value)
        return one

    def held_bytes(self, rows: int, model: Decoder) -> tuple[int, int]:
        """Bytes that it has on the device beside a model: of weights of its own, and of what it keeps of streams."""
        return 0, 0

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        """Up to `length` tokens behind the newest of each stream; of streams that are not `wanted` none.

        The streams' newest tokens are chosen and not read yet. Between two calls streams go on as they like, and
        never back.
        """
        raise NotImplementedError

    def learn(self, tokens: Int32[np.ndarray, " N"]) -> None:
        """A stream has ended with these tokens, which the model has generated; what is done with them is its affair."""


def ways_of_tree(parents: Int32[np.ndarray, "B N"]) -> list[list[list[int]]]:
    """For each node of each row the nodes from the root to itself; `parents[b, i]` is a node before i, of the root 0.

    Raises:
      ValueError: a parent that does not come before its node.
    """
    nodes = np.arange(parents.shape[1])
    if ((parents < 0) | (parents >= np.maximum(nodes, 1))).any():
        raise ValueError("each guess of a tree must follow the stream's newest token, 0, or a guess in front of it")
    found: list[list[list[int]]] = []
    for row in parents.tolist():
        ways = [[0]]
        for node, parent in enumerate(row[1:], 1):
            ways.append([*ways[parent], node])
        found.append(ways)
    return found
