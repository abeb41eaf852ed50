"""The tasks by name, and an example of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.ruler import counting, needles, neighbours, questions, tracking
from streamjax.data.ruler.example import Example, Turn, fitted
from streamjax.data.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is made of its name, a seed, a length in tokens and pieces of filler; `least` pieces at least."""

    make: Callable[[str, int, int, int], Example]
    least: int = 1


def _needles(task: str, seed: int, length: int, filler: int) -> Example:
    del length
    return needles.make_needles(task, seed, filler)


# Tasks of documents are made apart: they need a folder.
TASKS: dict[str, Task | None] = {
    **dict.fromkeys(needles.TASKS, Task(_needles)),
    "vt": Task(tracking.make_tracking),
    "cwe": Task(counting.make_common_words, least=10),
    "fwe": Task(counting.make_frequent_words, least=100),
    **dict.fromkeys(questions.FILES),
    "scbench_kv": Task(neighbours.make_key_value, least=neighbours.TURNS),
    "scbench_prefix_suffix": Task(neighbours.make_prefix_suffix, least=2 * neighbours.TURNS),
    "scbench_vt": Task(tracking.make_shared_tracking),
    "passkey": Task(neighbours.make_pass_key),
    "number_string": Task(neighbours.make_pass_key),
    "kv": Task(neighbours.make_key_value),
    "mrcr": Task(neighbours.make_coreference),
}
_RULER = tuple(TASKS)[: len(needles.TASKS) + 5]
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": _RULER,
    "needles": tuple(needles.TASKS),
    "scbench": tuple(name for name in TASKS if name.startswith("scbench_")),
    "infinitebench": ("passkey", "number_string", "kv"),
}


def task_names(words: Iterable[str]) -> list[str]:
    """Tasks by their own names or their groups', each once, in order.

    Raises:
      ValueError: a name of neither.

    Example:
      >>> task_names(["infinitebench", "kv"])
      ['passkey', 'number_string', 'kv']
    """
    names: list[str] = []
    for word in words:
        if word not in GROUPS and word not in TASKS:
            raise ValueError(f"unknown task {word!r}; use one of {', '.join([*GROUPS, *TASKS])}")
        names += GROUPS.get(word, (word,))
    return list(dict.fromkeys(names))


def make_example(
    task: str,
    length: int,
    tokenizer: Tokenizer,
    seed: int = 0,
    frame: ChatFrame | None = None,
    documents: str | Path | None = None,
) -> Example:
    """An example of a task whose context, questions and answers take `length` tokens, or a little less.

    Args:
      task: one of `TASKS`.
      length: tokens, with room for the answers; filler comes in pieces, and what does not fit whole is left out.
      tokenizer: counts them. Where an answer takes more of its tokens than the benchmark allows, as bytes do, it has
        as many as it takes, and eight more.
      seed: decides everything that is drawn.
      frame: the chat that will stand around it, see `chat_frame`; its tokens count.
      documents: the folder of `qa_1` and `qa_2`.

    Raises:
      ValueError: an unknown task, a length in which the task does not fit, or a folder without its documents.

    Example:
      >>> from streamjax.data import ByteTokenizer
      >>> example = make_example("niah_single_1", 2000, ByteTokenizer(), seed=3)
      >>> example.context.count(example.answers[0])
      1
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    entry, most = TASKS[task], None

    def build(filler: int) -> Example:
        made = (
            questions.make_question(task, seed, documents, filler)
            if entry is None
            else entry.make(task, seed, length, filler)
        )
        return dataclasses.replace(made, turns=tuple(_with_room(turn, tokenizer) for turn in made.turns))

    if entry is None:
        most = len(questions.read_file(task, questions.find_file(task, documents))[1])
    return fitted(build, length, tokenizer, frame, 1 if entry is None else entry.least, most)


def _with_room(turn: Turn, tokenizer: Tokenizer) -> Turn:
    answers = turn.answers if turn.rule == "any" else (", ".join(turn.answers),)
    needed = max(len(tokenizer.encode(" " + answer, continues=True)) for answer in answers)
    budget = turn.answer_tokens if needed <= turn.answer_tokens else needed + 8
    return dataclasses.replace(turn, answer_tokens=budget)
