"""Text without end in which a recall task hides what is to be found: sentences drawn one after another, from a seed.

Nothing is held but the sentence at hand, so a context of any length can be streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

Kind = Literal["repeat", "words"]
KINDS: tuple[str, ...] = get_args(Kind)

# The filler of the passkey task of Landmark Attention (2305.16300), which later papers kept.
_REPEATED = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)
_ADJECTIVES = [
    "old",
    "new",
    "small",
    "large",
    "quiet",
    "cold",
    "warm",
    "dark",
    "bright",
    "narrow",
    "heavy",
    "light",
    "empty",
    "round",
    "broken",
    "green",
]
_NOUNS = [
    "river",
    "lamp",
    "door",
    "boat",
    "garden",
    "letter",
    "mill",
    "road",
    "hill",
    "bridge",
    "tower",
    "clock",
    "market",
    "field",
    "stone",
    "window",
    "ship",
    "horse",
    "village",
    "forest",
    "chair",
    "house",
    "train",
    "winter",
    "morning",
    "kitchen",
    "teacher",
    "farmer",
    "captain",
    "painter",
]
_VERBS = [
    "carries",
    "finds",
    "leaves",
    "follows",
    "passes",
    "opens",
    "keeps",
    "moves",
    "sees",
    "draws",
    "crosses",
    "needs",
    "holds",
    "turns",
    "meets",
    "hides",
]
_PLACES = [
    "by the sea",
    "in the north",
    "after the rain",
    "near the wall",
    "on the hill",
    "before noon",
    "at night",
    "under a tree",
]


def sentences(kind: str, random: np.random.Generator) -> Iterator[str]:
    """Sentences without end, each with a space behind it.

    "repeat" is the five sentences of the passkey task, again and again, from a drawn one on. "words" is drawn
    sentences, some with numbers in them that nothing asks for.

    Raises:
      ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown haystack {kind!r}; use one of {', '.join(KINDS)}")
    if kind == "repeat":
        first = int(random.integers(len(_REPEATED)))
        while True:
            yield from _REPEATED[first:] + _REPEATED[:first]
    while True:
        # drawn many at a time: one call of the generator costs as much as a hundred numbers
        for draws in random.integers(0, 2**30, (64, 8)).tolist():
            yield _sentence(draws)


def _sentence(draws: list[int]) -> str:
    def pick(words: list[str], i: int) -> str:
        return words[draws[i] % len(words)]

    subject = f"The {pick(_ADJECTIVES, 0)} {pick(_NOUNS, 1)}"
    kind = draws[7] % 8
    if kind == 0:
        return f"{subject} has number {draws[2] % 10**5}. "
    if kind == 1:
        return f"It is {draws[2] % 24}:{draws[3] % 60:02d} {pick(_PLACES, 4)}. "
    ending = f" {pick(_PLACES, 6)}" if draws[5] % 3 == 0 else ""
    return f"{subject} {pick(_VERBS, 2)} a {pick(_ADJECTIVES, 3)} {pick(_NOUNS, 4)}{ending}. "
