"""The words of recall tasks: instruction, facts and questions, in one of two phrasings.

A model answers what it was asked in words that it knows. "passkey" are the words of Landmark Attention's task
(2305.16300), on which the models of this repository were trained (`training_rows.py`): bare facts, bare questions.
"ruler" are words in the manner of RULER (2404.06654): the reader is told that it will be quizzed, a question says what
it is about, and the answer is begun. Pretrained models that find every key when asked so find a third of them when
asked for "the pass key": that measures the phrasing, not the memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

from streamjax.data.recall.haystack import Kind
from streamjax.data.text.tokenizers import Tokenizer

Phrasing = Literal["ruler", "passkey"]
PHRASINGS: tuple[str, ...] = get_args(Phrasing)
USUAL_HAYSTACK: dict[str, Kind] = {"ruler": "repeat", "passkey": "words"}


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked behind the context, the answer as it is begun for the model, and how it has to go on."""

    asked: str
    begun: str
    answer: str

    @property
    def prompt(self) -> str:
        """All that stands before the answer, where there is no chat template."""
        return self.asked + self.begun


@dataclasses.dataclass(frozen=True)
class Wording:
    """opening: before the context. facts: the sentences to hide. questions: one about each fact, or one about all."""

    opening: str
    facts: list[str]
    questions: list[Question]


def default_phrasing(tokenizer: Tokenizer) -> Phrasing:
    """That of pretrained models, and for models of plain bytes, which this library trains, that of its rows."""
    return "passkey" if tokenizer.name == "bytes" else "ruler"


def word(phrasing: str, task: str, names: Sequence[str], values: Sequence[str]) -> Wording:
    """A task in words.

    Args:
      phrasing: one of `PHRASINGS`.
      task: see `tasks.py`.
      names, values: what the facts are about; "passkey" has one of each.

    Raises:
      ValueError: another phrasing.
    """
    if phrasing not in PHRASINGS:
        raise ValueError(f"unknown phrasing {phrasing!r}; use one of {', '.join(PHRASINGS)}")
    return _ruler(task, names, values) if phrasing == "ruler" else _passkey(task, names, values)


def passkey_fact(value: str) -> str:
    """The passkey in its sentence."""
    return f"The pass key is {value}. Remember it. {value} is the pass key. "


def passkey_question(value: str) -> Question:
    return Question("What is the pass key?", " The pass key is", f" {value}.")


def key_fact(name: str, value: str) -> str:
    """One of several keys in its sentence."""
    return f"The pass key of {name} is {value}. "


def key_question(name: str, value: str) -> Question:
    return Question(f"What is the pass key of {name}?", f" The pass key of {name} is", f" {value}.")


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}. ", *(f"VAR {new} = VAR {old}. " for old, new in itertools.pairwise(names))]


def _passkey(task: str, names: Sequence[str], values: Sequence[str]) -> Wording:
    if task == "passkey":
        return Wording("", [passkey_fact(values[0])], [passkey_question(values[0])])
    if task == "multi_value":
        question = Question(f"What are the magic numbers of {names[0]}?", " They are", f" {', '.join(values)}.")
        return Wording("", [f"A magic number of {names[0]} is {value}. " for value in values], [question])
    if task == "variable_tracking":
        question = Question(f"Which variables have the value {values[0]}?", " They are", f" {', '.join(names)}.")
        return Wording("", _chain(names, values[0]), [question])
    pairs = list(zip(names, values, strict=True))
    return Wording("", [key_fact(*pair) for pair in pairs], [key_question(*pair) for pair in pairs])


def _ruler(task: str, names: Sequence[str], values: Sequence[str]) -> Wording:
    if task == "variable_tracking":
        opening = "Memorize and track the chain of variable assignments hidden in the following text.\n"
        asked = f"\nFind all variables that are assigned the value {values[0]} in the text above."
        begun = f" By the chain of assignments, {len(names)} variables are assigned the value {values[0]}, they are:"
        return Wording(opening, _chain(names, values[0]), [Question(asked, begun, f" {', '.join(names)}")])
    opening = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n"
    )
    several = task == "multi_value"
    pairs = [(names[0], value) for value in values] if several else list(zip(names, values, strict=True))
    facts = [f"One of the special magic numbers for {name} is: {value}. " for name, value in pairs]
    if several:
        asked = f"\nWhat are all the special magic numbers for {names[0]} mentioned in the provided text?"
        begun = f" The special magic numbers for {names[0]} mentioned in the provided text are"
        return Wording(opening, facts, [Question(asked, begun, f" {', '.join(values)}")])
    questions = [
        Question(
            f"\nWhat is the special magic number for {name} mentioned in the provided text?",
            f" The special magic number for {name} mentioned in the provided text is",
            f" {value}",
        )
        for name, value in pairs
    ]
    return Wording(opening, facts, questions)
