"""Rewards of answers: functions that are built in, and a user's own by their Python path."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64


class Answer(NamedTuple):
    """An answer that a model wrote.

    prompt: what it answers, as text, with special tokens. text: the answer without special tokens. tokens: its ids, the
    one that ended it among them. record: all fields of the prompt's record. ended: whether it ended by itself.
    """

    prompt: str
    text: str
    tokens: Sequence[int]
    record: Mapping[str, Any]
    ended: bool


Reward = Callable[[Sequence[Answer]], Sequence[float]]


def exact_match(answers: Sequence[Answer]) -> list[float]:
    """1 for an answer that is its record's `reference`, white space around both aside, else 0."""
    return [float(answer.text.strip() == _reference(answer).strip()) for answer in answers]


def find_reward(name: str) -> Reward:
    """The reward function of a name.

    "exact_match" is 1 for an answer that is its record's `reference`. "regex:PATTERN" is 1 where the pattern is found
    in the answer. "length:N" is 1 for answers of N tokens, and falls to 0 at no token and at twice as many.
    "module:function" is a function of one's own, which takes a list of `Answer` and returns a number for each; modules
    are looked for in the working folder too.

    Raises:
      ValueError: another name, a pattern that is none, or a module or function that is not there.
    """
    kind, _, rest = name.partition(":")
    if name == "exact_match":
        return exact_match
    if kind == "regex":
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise ValueError(f"reward {name!r}: it is no regular expression ({error})") from error
        return lambda answers: [float(pattern.search(answer.text) is not None) for answer in answers]
    if kind == "length":
        if not rest.isdecimal() or int(rest) < 1:
            raise ValueError(f"reward {name!r}: it is written length:TOKENS, for instance length:50")
        wanted = int(rest)
        return lambda answers: [max(0.0, 1.0 - abs(len(a.tokens) - wanted) / wanted) for a in answers]
    if not rest:
        raise ValueError(f"unknown reward {name!r}: use exact_match, regex:PATTERN, length:TOKENS or module:function")
    return _own(name, kind, rest)


def rewards_of(
    answers: Sequence[Answer], names: Sequence[str], functions: Sequence[Reward]
) -> Float64[np.ndarray, "F B"]:
    """What each function gives to each answer.

    Raises:
      ValueError: a function that fails, or does not return a finite number for each answer.
    """
    found = np.zeros((len(functions), len(answers)))
    for i, (name, function) in enumerate(zip(names, functions, strict=True)):
        try:
            values = [float(value) for value in function(answers)]
        except Exception as error:  # a user's own code
            reason = " ".join(str(error).split())
            raise ValueError(f"reward {name!r} failed: {type(error).__name__}: {reason}") from error
        if len(values) != len(answers) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"reward {name!r} returned {len(values)} values for {len(answers)} answers: a finite number is needed "
                "for each"
            )
        found[i] = values
    return found


def _reference(answer: Answer) -> str:
    reference = answer.record.get("reference")
    if reference is None:
        raise ValueError('a record has no "reference" to compare with')
    return str(reference)


def _own(name: str, module: str, function: str) -> Reward:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a user's own code
        reason = " ".join(str(error).split())
        raise ValueError(f"reward {name!r}: module {module!r} cannot be imported: {reason}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r}: module {module!r} has no function {function!r}")
    reward: Reward = found
    return reward
