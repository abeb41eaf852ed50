"""Rows of a text to train on, drawn without end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from jaxtyping import Int, Int32


def text_rows(
    text: Int[np.ndarray, " N"], length: int, rows: int, seed: int = 0, *, apart: int = 1
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """Batches without end of `rows` stretches of a text, each of `length` tokens.

    Args:
      text: its tokens.
      length: T. rows: B.
      seed: of the draw.
      apart: stretches begin at multiples of this. Where it is `length`, the same few come again and again, and what was
        computed of one can be kept.

    Raises:
      ValueError: a text that is no longer than a stretch.
    """
    if len(text) <= length:
        raise ValueError(f"a text of {len(text)} tokens has no stretches of {length}: give a longer one, or --seq_len")
    text, draw = np.asarray(text, np.int32), np.random.default_rng(seed)
    places = -(-(len(text) - length) // apart)
    return (np.stack([text[i : i + length] for i in apart * draw.integers(0, places, rows)]) for _ in count())
