"""RULER's variable tracking (2404.06654): a value handed from variable to variable, in noise; who has it in the end?

As published: one chain of four hops, names of five letters, a solved example before the task, 30 tokens for an answer.
The solved example has ten lines of noise, five for lengths below 4,096 (RULER fills it up to about 500 tokens).
"""

from __future__ import annotations

import itertools
import random
import string

from streamjax.data.ruler.example import Example, Turn
from streamjax.data.ruler.words import NOISE

HOPS = 4
ANSWER_TOKENS = 30


def make_tracking(task: str, seed: int, length: int, filler: int) -> Example:
    """An example with so many lines of noise."""
    draw = random.Random(f"{task} {seed}")
    shown = _chain(draw, HOPS, 3)
    value = str(draw.randrange(10000, 99999))
    solved = _told(_in_noise(draw, [_assignments(shown, value)], 10 if length >= 4096 else 5))
    asked, begun = _question(value, HOPS + 1)
    solved += f"{asked}{begun}{' '.join(shown)}\n\n"
    names, value = _chain(draw, HOPS, 5), str(draw.randrange(10000, 99999))
    context = _told(_in_noise(draw, [_assignments(names, value)], filler))
    return Example(task, solved + context, (Turn(*_question(value, HOPS + 1), tuple(names), ANSWER_TOKENS),))


def make_shared_tracking(task: str, seed: int, length: int, filler: int) -> Example:
    """Five chains of three hops in one context, and a question about each, in a drawn order (after SCBench)."""
    del length
    draw = random.Random(f"{task} {seed}")
    chains, hops = 5, 3
    names = _chain(draw, chains * (hops + 1) - 1, 5)
    values = draw.sample(range(10000, 99999), chains)
    parts = [names[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
    lines = [_assignments(part, str(value)) for part, value in zip(parts, values, strict=True)]
    turns = [
        Turn(*_question(str(value), hops + 1), tuple(part), ANSWER_TOKENS)
        for part, value in zip(parts, values, strict=True)
    ]
    draw.shuffle(turns)
    return Example(task, _told(_in_noise(draw, lines, filler)), tuple(turns))


def _chain(draw: random.Random, hops: int, letters: int) -> list[str]:
    """Different names, one more than there are hops."""
    names: dict[str, None] = {}
    while len(names) <= hops:
        names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _assignments(names: list[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]


def _in_noise(draw: random.Random, chains: list[list[str]], filler: int) -> str:
    """Chains among lines of noise, each chain in order."""
    placed = []
    for chain in chains:
        places = sorted(int(draw.random() * filler) for _ in chain)
        placed += [(place, line) for place, line in zip(places, chain, strict=True)]
    lines = [NOISE] * filler
    # From the end, and of lines at one place the later one first, so that a chain stays in order.
    for place, line in sorted(reversed(placed), key=lambda pair: pair[0], reverse=True):
        lines.insert(place, line)
    return "\n".join(lines)


def _told(text: str) -> str:
    return f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"


def _question(value: str, names: int) -> tuple[str, str]:
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {names} variables are assigned "
        f"the value {value}, they are: ",
    )
