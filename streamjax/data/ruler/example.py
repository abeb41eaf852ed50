"""What a task of a benchmark is made of: a context, questions about it, answers; its length, its ids, its score."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Literal

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.recall.phrasings import Question
from streamjax.data.text.tokenizers import Tokenizer

Rule = Literal["all", "any", "ratio"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question behind a context.

    question: with the line break before it. answer_prefix: the answer as it is begun for the model. answers: what it
    must say. answer_tokens: how many tokens it may take. rule: see `score`.
    """

    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    answer_tokens: int
    rule: Rule = "all"


@dataclasses.dataclass(frozen=True)
class Example:
    """A context and one question about it, or several, one after another; the attributes speak of the first."""

    task: str
    context: str
    turns: tuple[Turn, ...]

    @property
    def question(self) -> str:
        return self.turns[0].question

    @property
    def answer_prefix(self) -> str:
        return self.turns[0].answer_prefix

    @property
    def answers(self) -> tuple[str, ...]:
        return self.turns[0].answers

    @property
    def answer_tokens(self) -> int:
        return self.turns[0].answer_tokens


def score(turn: Turn, said: str) -> float:
    """How much of an answer a text has, 0 to 1, as the benchmarks count it.

    "all": the share of the answers that the text contains, letters of either case (RULER's `string_match_all`). "any":
    whether it contains one of them (`string_match_part`). "ratio": how alike the text and the answer are, by
    `difflib`, if the text begins with the answer's first word, and else nothing (MRCR).

    Example:
      >>> score(Turn("?", "", ("12", "34"), 8), "It is 34.")
      0.5
    """
    if turn.rule == "ratio":
        answer, text = turn.answers[0], said.strip()
        if not text.startswith(answer.split(maxsplit=1)[0]):
            return 0.0
        return difflib.SequenceMatcher(None, text, answer, autojunk=False).ratio()
    found = [answer.lower() in said.lower() for answer in turn.answers]
    return float(any(found)) if turn.rule == "any" else sum(found) / len(found)


def encode_example(
    tokenizer: Tokenizer, example: Example, frame: ChatFrame | None = None
) -> tuple[list[int], list[list[int]]]:
    """Ids of the context, and of each question with its answer's beginning.

    The context begins as a text of the model does, or with `frame` (see `chat_frame`) as a chat does. Both parts are
    encoded apart, as kvpress encodes them: a cache may be compacted between them.
    """
    if frame is None:
        context = tokenizer.encode(example.context, add_bos=tokenizer.adds_bos)
        prompts = [turn.question + turn.answer_prefix for turn in example.turns]
    else:
        context = tokenizer.encode(frame.before + example.context)
        prompts = [
            frame.prompt(Question(turn.question, turn.answer_prefix, ""), first=index == 0)
            for index, turn in enumerate(example.turns)
        ]
    return context, [tokenizer.encode(prompt, continues=True) for prompt in prompts]


def fitted(
    build: Callable[[int], Example],
    length: int,
    tokenizer: Tokenizer,
    frame: ChatFrame | None = None,
    least: int = 1,
    most: int | None = None,
) -> Example:
    """The example with the most filler that fits: the context, the questions and room for the answers.

    Args:
      build: the example with so many pieces of filler, everything else the same.
      length: tokens.
      tokenizer, frame: how it is encoded.
      least, most: pieces of filler, at least and at most.

    Raises:
      ValueError: not even `least` pieces fit.
    """

    def size(example: Example) -> int:
        context, prompts = encode_example(tokenizer, example, frame)
        return len(context) + sum(map(len, prompts)) + sum(turn.answer_tokens for turn in example.turns)

    low, best = least, build(least)
    if (smallest := size(best)) > length:
        raise ValueError(f"task {best.task!r} needs {smallest:,} tokens at least, and the length is {length:,}")
    high = None  # what is known to be too much
    while high is None or high - low > 1:
        middle = 2 * low if high is None else (low + high) // 2
        if most is not None and middle > most:
            high = most + 1
            continue
        example = build(middle)
        if size(example) <= length:
            low, best = middle, example
        else:
            high = middle
    return best
