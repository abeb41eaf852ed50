"""Synthetic recall tasks: facts hidden in a haystack of any length, questions behind it, answers to compare with.

`passkey` is Landmark Attention's (2305.16300); `multi_key`, `multi_value` and `variable_tracking` are those of RULER
(2404.06654) in shape; `multi_turn` asks several questions about one context, one after another, as SCBench (2412.10319)
does. Their words are in `phrasings.py`. A `Problem` is small; `stream_context` makes its context token by token, so
that 16 million tokens need no memory.

Sentences, questions and answers are encoded one by one, each behind a space (`encode_sentence`, `encode_question`), as
the ids of one text: no tokenizer marks a beginning in the middle of a stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.recall.haystack import sentences
from streamjax.data.recall.phrasings import Question, word
from streamjax.data.text.tokenizers import Tokenizer

TaskName = Literal["passkey", "multi_key", "multi_value", "variable_tracking", "multi_turn"]
TASKS: tuple[str, ...] = get_args(TaskName)
NAMES = [
    "amber",
    "basil",
    "cedar",
    "daisy",
    "ember",
    "fern",
    "grove",
    "hazel",
    "iris",
    "jade",
    "kelp",
    "lilac",
    "maple",
    "nutmeg",
    "olive",
    "pearl",
    "quartz",
    "rose",
    "sage",
    "thyme",
    "umber",
    "violet",
    "walnut",
    "yarrow",
    "zinnia",
]
_BLOCK = 1 << 16  # tokens that a streamed context yields at a time


@dataclasses.dataclass(frozen=True)
class Problem:
    """Facts at their depths in a context, and questions about them.

    needles: (depth, text); a depth of 0 is the start of the context, 1 its end. haystack, seed: what lies between.
    opening: what stands before it.
    """

    task: str
    needles: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]
    haystack: str
    seed: int
    opening: str = ""


def make_problem(
    task: str,
    depth: float | None,
    seed: int,
    haystack: str = "words",
    needles: int = 4,
    phrasing: str = "passkey",
) -> Problem:
    """Draw a problem.

    Args:
      task: one of `TASKS`.
      depth: of the fact that is asked for, or of the first of them, in [0, 1]; drawn where None. Others are drawn.
      seed: decides everything that is drawn.
      haystack: see `sentences`.
      needles: facts in the context, for all tasks but "passkey".
      phrasing: the words; see `phrasings.py`.

    Raises:
      ValueError: an unknown task or phrasing, a depth outside [0, 1], fewer than one needle or more than there are
        names.
    """
    if task not in TASKS:
        raise ValueError(f"unknown recall task {task!r}; use one of {', '.join(TASKS)}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}: use 0 (the start of the context) to 1 (its end)")
    if not 1 <= needles <= len(NAMES):
        raise ValueError(f"needles is {needles}: use 1 to {len(NAMES)}")
    random = np.random.default_rng([seed, TASKS.index(task)])
    count = 1 if task == "passkey" else needles
    depths = random.random(count)
    names = [NAMES[i] for i in random.permutation(len(NAMES))[:count]]
    values = [f"{value:05d}" for value in random.permutation(10**5)[:count]]
    if depth is not None:
        if task == "variable_tracking":  # a chain lies in order behind its first assignment
            depths = depth + (1.0 - depth) * np.sort(depths)
        depths[0] = depth
    if task in ("multi_value", "variable_tracking"):
        depths = np.sort(depths)
    wording = word(phrasing, task, names, values)
    texts, questions = wording.facts, wording.questions
    if task == "multi_key":
        questions = questions[:1]
    elif task == "multi_turn":
        questions = [questions[i] for i in random.permutation(count)]
    order = np.argsort(depths, kind="stable")
    placed = tuple((float(depths[i]), texts[i]) for i in order)
    return Problem(task, placed, tuple(questions), haystack, seed, wording.opening)


def encode_sentence(tokenizer: Tokenizer, text: str, first: bool = False) -> list[int]:
    """Ids of a sentence of a stream, with the space before it and without the one behind it.

    Args:
      tokenizer: whose ids.
      text: the sentence.
      first: whether the stream begins with it: then there is no space before it.
    """
    text = text.strip(" ")
    return tokenizer.encode(text) if first else tokenizer.encode(" " + text, continues=True)


def encode_question(tokenizer: Tokenizer, question: Question, prompt: str | None = None) -> tuple[list[int], list[int]]:
    """Ids of a question behind a context, and of its answer: together those of the text that they are.

    What a model has to say is all that differs from the question alone: a token may reach from one into the other.
    `prompt` stands for the question where a chat template has written around it.
    """

    def encode(text: str) -> list[int]:
        return encode_sentence(tokenizer, text) if prompt is None else tokenizer.encode(text, continues=True)

    words = question.prompt if prompt is None else prompt
    asked, both = encode(words), encode(words + question.answer)
    same = next((i for i, pair in enumerate(zip(asked, both, strict=False)) if pair[0] != pair[1]), len(asked))
    same = min(same, len(both))
    return both[:same], both[same:]


def stream_context(
    problem: Problem, length: int, tokenizer: Tokenizer, frame: ChatFrame | None = None
) -> Iterator[Int32[np.ndarray, " N"]]:
    """The context of a problem, exactly `length` tokens, in pieces: BOS where the tokenizer adds one, then text.

    With `frame` the text begins as the model's chat template begins a conversation, BOS included. Each needle stands
    where its depth says, moved forwards where it would not fit before the end.

    Raises:
      ValueError: a length in which the needles do not fit.
    """
    if frame is None:
        start = tokenizer.encode(problem.opening, add_bos=tokenizer.adds_bos)
    else:
        start = tokenizer.encode(frame.before + problem.opening)
    sizes = [len(encode_sentence(tokenizer, fact)) for _, fact in problem.needles]
    room = length - len(start) - sum(sizes)
    if room < 0:
        raise ValueError(f"a context of {length} tokens has no room for the facts of {problem.task!r}: {-room} more")
    text = sentences(problem.haystack, np.random.default_rng([problem.seed, 1]))
    piece, done = list(start), 0  # `done` counts the haystack's own tokens, of which there are `room`
    first = True
    for (depth, fact), size in zip([*problem.needles, (1.0, "")], [*sizes, 0], strict=True):
        goal = round(depth * room)
        while done < goal:
            more = encode_sentence(tokenizer, next(text), first)
            end = done + len(more)
            if end > goal and (goal == room or end > room or goal - done < len(more) // 2):
                more = more[: room - done] if goal == room else []
                goal = room if goal == room else done
            first &= not more
            piece += more
            done += len(more)
            if len(piece) >= _BLOCK:
                yield np.asarray(piece[:_BLOCK], np.int32)
                piece = piece[_BLOCK:]
        if fact:
            ids = encode_sentence(tokenizer, fact, first)
            first = False
            piece += ids
            room += size - len(ids)  # without a space before it, it may be shorter
    while piece:
        yield np.asarray(piece[:_BLOCK], np.int32)
        piece = piece[_BLOCK:]
