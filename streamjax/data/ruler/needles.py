"""RULER's eight tasks of needles in a haystack (2404.06654): sentences that give a key its value, hidden in filler.

The sentences, what is hidden and how much of it, and the budget of 128 tokens for an answer are the published ones.
Keys are an adjective and a noun of our own lists, and the essays are `words.essay_words`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Literal

from streamjax.data.ruler import words
from streamjax.data.ruler.example import Example, Turn

Kind = Literal["numbers", "words", "uuids"]
_DRAW: dict[str, Callable[[random.Random], str]] = {
    "numbers": words.number,
    "words": words.name,
    "uuids": words.unique_id,
}
_DEPTHS = tuple(round(step * 100 / 39) for step in range(40))  # per cent of the essay's sentences


@dataclasses.dataclass(frozen=True)
class Needles:
    """haystack: what hides the needles; "needle" is more of their kind. keys, values: how many, values of each key.
    queries: keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}
ANSWER_TOKENS = 128


def make_needles(task: str, seed: int, filler: int) -> Example:
    """An example with so much filler: lines of noise, needles that nothing asks for, or words of an essay."""
    spec = TASKS[task]
    draw = random.Random(f"{task} {seed}")
    keys = list(dict.fromkeys(_DRAW[spec.key_kind](draw) for _ in range(spec.keys)))
    while len(keys) < spec.keys:
        keys = list(dict.fromkeys([*keys, _DRAW[spec.key_kind](draw)]))
    values = {key: [_DRAW[spec.value_kind](draw) for _ in range(spec.values)] for key in keys}
    needles = [_sentence(spec, key, value) for key in keys for value in values[key]]
    draw.shuffle(needles)
    asked = draw.sample(keys, spec.queries)
    context = _hidden(spec, needles, set(keys), draw, filler)
    return _asked(task, spec, asked, [value for key in asked for value in values[key]], context)


def _sentence(spec: Needles, key: str, value: str) -> str:
    return f"One of the special magic {spec.value_kind} for {key} is: {value}."


def _hidden(spec: Needles, needles: list[str], keys: set[str], draw: random.Random, filler: int) -> str:
    if spec.haystack == "essay":
        sentences = words.essay(filler)
        depths = sorted(draw.sample(_DEPTHS, len(needles)))
        places = [len(sentences) * depth // 100 for depth in depths]
        glue = " "
    else:
        places = sorted(int(draw.random() * filler) for _ in needles)
        source = _others(spec, keys, draw) if spec.haystack == "needle" else _noise()
        sentences = [next(source) for _ in range(filler)]
        glue = "\n"
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        sentences.insert(place, needle)
    return glue.join(sentences)


def _noise() -> Iterator[str]:
    while True:
        yield words.NOISE


def _others(spec: Needles, taken: set[str], draw: random.Random) -> Iterator[str]:
    """Needles with keys that nothing asks for."""
    while True:
        key = _DRAW[spec.key_kind](draw)
        if key not in taken:
            yield _sentence(spec, key, _DRAW[spec.value_kind](draw))


def _asked(task: str, spec: Needles, keys: list[str], answers: list[str], context: str) -> Example:
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(answers) == 1:
        kind = spec.value_kind[:-1]
        opening = f"A special magic {kind} is hidden within the following text. "
        ask, said = "What is the", "is"
    else:
        kind = spec.value_kind
        opening = f"Some special magic {kind} are hidden within the following text. "
        ask, said = "What are all the", "are"
    opening += f"Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    turn = Turn(
        f"\n{ask} special magic {kind} for {names} mentioned in the provided text?",
        f" The special magic {kind} for {names} mentioned in the provided text {said}",
        tuple(answers),
        ANSWER_TOKENS,
    )
    return Example(task, opening + context, (turn,))
