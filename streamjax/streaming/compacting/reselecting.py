"""Answers that read a choice of what a stream holds, made anew every few tokens (LoopServe, Li et al., 2507.13681).

The stream keeps all of its tokens. While an answer is written, a small cache stands for it: `compact` lays out in it
what the newest tokens attend to, first at the end of the user's turn, then after every `every` tokens of the answer,
which the stream reads before. So no choice is final, and each turn chooses by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array

from streamjax.field_checks import Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.streaming.compacting.compact import compact
from streamjax.streaming.generate import generate_blocks
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.scan import read
from streamjax.streaming.state import StreamState


@dataclasses.dataclass(frozen=True)
class Reselection:
    """How answers are written.

    Attributes:
      cache: what an answer reads, such as `sj.kv.preset("snapkv", window=32, size=480)`.
      every: tokens of an answer between two choices. More are cheaper: each choice reads the stream's whole cache once
        for `asked` tokens.
      asked: newest tokens of the stream whose attention decides.

    Raises:
      ValueError: numbers below 1.
    """

    cache: Cache
    every: Size = 16
    asked: Size = 16

    def __post_init__(self) -> None:
        check_fields(self)


def generate_reselecting(
    model: Decoder,
    state: StreamState,
    recent: Sequence[int],
    choice: Reselection,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    stop_tokens: Sequence[int] = (),
    first_index: int = 0,
    chunk_size: int = 512,
    until: Callable[[Sequence[int]], int] | None = None,
) -> Iterator[tuple[StreamState, np.ndarray]]:
    """Continue one stream, yielding `(state, tokens [1, n])` after every choice's tokens, which the state has read.

    Args:
      model: the model.
      state: one stream, whose cache holds all that can be chosen; donated to the next piece.
      recent: the newest ids that it has read, `choice.asked` or more where there are.
      choice: what the answer reads, and how often that is chosen.
      max_new_tokens, sampler, key, stop_tokens, first_index, chunk_size: as in `generate_blocks`.
      until: how many of some new tokens are read at most, where a text ends.

    Raises:
      ValueError: as `compact` and `generate`; nothing was read to choose by.
    """
    if not len(recent):
        raise ValueError("nothing was read whose attention could choose: read a prompt first")
    newest, drawn = list(recent)[-choice.asked :], 0
    while drawn < max_new_tokens:
        count = min(choice.every, max_new_tokens - drawn)
        chosen = compact(model, state, choice.cache, np.array([newest], np.int32))
        pieces = generate_blocks(
            model,
            chosen,
            np.zeros((1, 0), np.int32),
            max_new_tokens=count,
            sampler=sampler,
            key=key,
            stop_tokens=stop_tokens,
            block=choice.every,
            first_index=first_index + drawn,
        )
        new = [int(token) for _, tokens in pieces for token in tokens[0] if token >= 0]
        kept = new if until is None else new[: until(new)]
        state = read(model, state, np.array([kept], np.int32), chunk_size)
        newest, drawn = [*newest, *kept][-choice.asked :], drawn + len(kept)
        yield state, np.array([kept], np.int32)
        if len(kept) < count or kept[-1] in stop_tokens:
            return
