"""How many guesses fit into a budget of memory (SpecMemo, Yildirim and Chen, 2506.01986).

SpecMemo models what speculation adds to a model's memory, finds the least budget with which guesses are still worth it,
and allocates for no more candidates than that. Here a drafter's memory is three sums: what it holds whatever it guesses
(weights of its own), what it holds for each stream, and what a pass holds that reads guesses. The last one grows with
guesses, and with rows: logits behind each node, and what each layer has waiting until it is known what counts.

What differs: nothing is fitted to a device. The sums are counted from the shapes of the very program that will run
(`live_bytes.py`), so they hold for every cache and every kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from streamjax.byte_units import human_bytes
from streamjax.models.decoder import Decoder
from streamjax.streaming.speculative.drafter import Drafter

_readable = partial(human_bytes, smallest="bytes")


@dataclasses.dataclass(frozen=True)
class DraftMemory:
    """What guesses take: for so many streams, so many guesses a stream in passes over so many tokens of each.

    weights, state, work: bytes of the drafter's weights, of what it holds of all streams, and of a pass with its
    margin.
    """

    rows: int
    guesses: int
    tokens: int
    weights: int
    state: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.work

    def __str__(self) -> str:
        streams = "a stream" if self.rows == 1 else f"each of {self.rows} rows"
        guesses = "1 guess" if self.guesses == 1 else f"{self.guesses} guesses"
        return (
            f"{guesses} for {streams}: {_readable(self.total)}, {_readable(self.weights)} of weights, "
            f"{_readable(self.state)} of states, {_readable(self.work)} a pass over {self.tokens} tokens"
        )


def draft_memory(drafter: Drafter, model: Decoder, rows: int, work: int) -> DraftMemory:
    """What a drafter takes beside a model, whose passes were counted to take so much (`live_bytes`).

    An eighth is added to that: of what a compiler allocates the count has found nine tenths at least.
    """
    weights, state = drafter.held_bytes(rows, model)
    return DraftMemory(rows, drafter.nodes, drafter.pass_width, weights, state, work + work // 8)


def fitted(
    drafter: Drafter, model: Decoder, rows: int, memory_bytes: int, work: Callable[[Drafter], int]
) -> tuple[Drafter, DraftMemory]:
    """The drafter, or one that guesses less (`Drafter.smaller`): the largest that fits.

    Args:
      drafter: who guesses.
      model: whom for.
      rows: streams.
      memory_bytes: what guesses may take.
      work: what a drafter's pass takes, in bytes; not less for more guesses.

    Raises:
      ValueError: one guess is too much; the line says what it takes, and how many streams would fit.
    """
    found = [drafter]
    while (smaller := found[-1].smaller()) is not None:
        found.append(smaller)
    low, high, best = 0, len(found) - 1, None
    while low <= high:
        middle = (low + high) // 2 if best is not None or low else low  # the whole drafter first: it often fits
        plan = draft_memory(found[middle], model, rows, work(found[middle]))
        if plan.total <= memory_bytes:
            best, high = (found[middle], plan), middle - 1
        else:
            low = middle + 1
    if best is not None:
        return best
    least = draft_memory(found[-1], model, rows, work(found[-1]))
    fit = (memory_bytes - least.weights) * rows // max(least.state + least.work, 1)
    more = f"{fit} would fit" if fit > 0 else "no row would fit"
    raise ValueError(
        f"{_readable(memory_bytes)} is too little for guesses: {least}" + (f"; of rows {more}" if rows > 1 else "")
    )
