"""What a drafter is: whoever guesses how streams go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int32

from streamjax.field_checks import Size, check_fields
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.history import History


@dataclasses.dataclass(frozen=True)
class Draws:
    """How each stream's next tokens will be chosen: by whom, with which key, and which number its next draw has.

    A drafter that draws by it meets the same random numbers as the model that verifies, and so agrees most often.
    """

    sampler: Sampler
    key: Array | None
    index: Int32[np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Guesses for B streams: `count[b]` of the tokens of row b, 0 where the drafter has no idea."""

    tokens: Int32[np.ndarray, "B K"]
    count: Int32[np.ndarray, " B"]


@dataclasses.dataclass
class Drafter:
    """Guesses how streams go on. Whatever it says, what is generated is the same: only how fast depends on it.

    Args:
      length: tokens that it guesses at most, K; a pass of the model then reads up to K + 1.
    """

    length: Size = 7

    def __post_init__(self) -> None:
        check_fields(self)

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        """Up to `length` tokens behind the newest of each stream; of streams that are not `wanted` none.

        The streams' newest tokens are chosen and not read yet. Between two calls streams go on as they like, and
        never back.
        """
        raise NotImplementedError

    def learn(self, tokens: Int32[np.ndarray, " N"]) -> None:
        """A stream has ended with these tokens, which the model has generated; what is done with them is its affair."""
