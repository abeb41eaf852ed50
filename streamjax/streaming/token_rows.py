"""Token ids as callers have them, to right-padded rows: arrays, or sequences of rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Int, Int64

# One row a stream. Rows of a sequence may have different lengths, and may be sequences of ints or arrays themselves.
Rows = Int[Array, "B T"] | np.ndarray | Sequence[Sequence[int] | Int[Array, " _"] | np.ndarray]


def as_rows(
    tokens: Rows, lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None
) -> tuple[Int[np.ndarray, "B T"], Int64[np.ndarray, " B"]]:
    """Rows as one right-padded array, and how many tokens of each are real.

    Args:
      tokens: an array [B, T], or a sequence of B rows.
      lengths: real tokens in each row, no more than it has; all of them where None.

    Raises:
      ValueError: tokens that are no rows of whole numbers, or lengths that do not fit them.
    """
    if isinstance(tokens, np.ndarray | Array):
        array = np.asarray(tokens)
        if array.ndim != 2:
            raise ValueError(f"tokens must be [batch, length], one row a stream; got shape {list(array.shape)}")
        held = np.full(len(array), array.shape[1], np.int64)
    else:
        rows = [_row(tokens, i) for i in range(_count(tokens))]
        held = np.array([len(row) for row in rows], np.int64)
        array = np.zeros((len(rows), int(held.max(initial=0))), np.int64)
        for i, row in enumerate(rows):
            array[i, : len(row)] = row
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens must be whole numbers, got {array.dtype}")
    return array, held if lengths is None else _checked_lengths(lengths, held)


def require_ids(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> None:
    """Raise a ValueError unless every real token is an id that the model has; padding may be anything.

    On the device such ids go unnoticed: an embedding is looked up as NaN, or counted from the vocabulary's end.
    """
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    wrong = ((tokens < 0) | (tokens >= vocab_size)) & (np.arange(tokens.shape[1]) < lengths[:, None])
    if wrong.any():
        row, place = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"token id {tokens[row, place]} at place {place} of row {row} is outside the model's vocabulary of "
            f"{vocab_size}; where rows end in padding, give their lengths"
        )


def require_one_length(lengths: np.ndarray, what: str, least: Literal[1, 2] = 1) -> int:
    """The length that all rows have; a ValueError that begins with `what` unless they have one, of `least` or more."""
    if not lengths.size or lengths.min() != lengths.max() or lengths.min() < least:
        tokens = "one token" if least == 1 else "two tokens"
        raise ValueError(f"{what} rows of one length, of at least {tokens}; they have {lengths.tolist()}")
    return int(lengths[0])


def _count(tokens: Rows) -> int:
    try:
        if isinstance(tokens, str | bytes):
            raise TypeError
        return len(tokens)
    except TypeError:
        kind = type(tokens).__name__
        raise ValueError(f"tokens must be an array [batch, length] or a list of rows, got {kind}") from None


def _row(tokens: Rows, index: int) -> np.ndarray:
    """One row of a sequence as an array of whole numbers."""
    try:
        row = np.asarray(tokens[index])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"row {index} of the tokens is no sequence of token ids: {error}") from error
    if row.ndim != 1:
        what = "a single number; give one list a stream" if row.ndim == 0 else f"an array of shape {list(row.shape)}"
        raise ValueError(f"row {index} of the tokens is {what}")
    if row.size and not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"row {index} of the tokens must hold whole numbers, got {row.dtype}")
    if row.size and row.max() > np.iinfo(np.int64).max:
        raise ValueError(f"row {index} of the tokens holds {row.max()}, which is no token id")
    return row.astype(np.int64)


def _checked_lengths(lengths: Int[Array, " B"] | np.ndarray | Sequence[int], held: np.ndarray) -> np.ndarray:
    given = np.asarray(lengths)
    whole = given.size == 0 or np.issubdtype(given.dtype, np.integer)
    if not whole or given.shape != held.shape or (given < 0).any() or (given > held).any():
        most = int(held.max(initial=0))
        raise ValueError(f"lengths must be one number in [0, {most}] a row, got {given.tolist()}")
    return given.astype(np.int64)
