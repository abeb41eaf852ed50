"""Rows of a source and its output in the order in which a reader of wait-k meets them (1810.08398, 2505.16983).

With `wait=2`, `between=1` and an output of `begin=1` given token, source a b c d and output < x y z make the row

    tokens   a  b  <  c  x  d  y
    outputs  .  .  1  .  1  .  1
    targets  .  .  x  .  y  .  z
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int32

IGNORED = -1


class GroupedRows(NamedTuple):
    """Rows, right-padded.

    tokens: int32 [B, T], in the order in which they come. outputs: which are of the output, padding among them.
    targets: the output token that a token has to say; -1 where there is none.
    """

    tokens: Int32[np.ndarray | Array, "B T"]
    outputs: Bool[np.ndarray | Array, "B T"]
    targets: Int32[np.ndarray | Array, "B T"]


def wait_k_rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    wait: int | None,
    between: int = 1,
    begin: int = 1,
    length: int | None = None,
) -> GroupedRows:
    """Rows of sources and outputs.

    Args:
      pairs: token ids of a source and of its output.
      wait: source tokens in front of the first output token that is to be said; None: all of them, as in a batch.
      between: source tokens between two of these.
      begin: tokens of an output that are given.
      length: of all rows; that of the longest where None. Longer rows are cut.

    Raises:
      ValueError: no pairs, an output that says nothing behind what is given, or numbers out of range.
    """
    if not pairs:
        raise ValueError("wait_k_rows: there are no pairs")
    if begin < 1 or between < 0 or (wait is not None and wait < 0):
        raise ValueError(f"wait_k_rows: begin is {begin}, between {between} and wait {wait}: at least 1, 0 and 0")
    rows = [_row(list(source), list(output), wait, between, begin) for source, output in pairs]
    width = length or max(map(len, rows))
    whole = np.tile(np.array([0, 1, IGNORED], np.int32), (len(rows), width, 1))
    for made, row in zip(whole, rows, strict=True):
        cut = row[:width]
        made[: len(cut)] = cut
    return GroupedRows(whole[..., 0], whole[..., 1].astype(bool), whole[..., 2])


def _row(source: list[int], output: list[int], wait: int | None, between: int, begin: int) -> list[tuple]:
    """Triples of a token, whether it is of the output, and what it has to say."""
    said = output[begin:]
    if not said:
        raise ValueError(f"an output of {len(output)} tokens, of which {begin} are given, says nothing")
    row: list[tuple] = []
    read = 0
    for i, target in enumerate(said):
        until = len(source) if wait is None else min(wait + i * between, len(source))
        row += [(token, 0, IGNORED) for token in source[read:until]]
        read = max(read, until)
        fed = output[:begin] if i == 0 else output[begin + i - 1 : begin + i]
        row += [(token, 1, IGNORED) for token in fed[:-1]]
        row.append((fed[-1], 1, target))
    return row
