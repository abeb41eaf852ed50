"""The tasks by name, and an example of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.ruler import needles
from streamjax.data.ruler.example import Example, fitted
from streamjax.data.text.tokenizers import Tokenizer

Build = Callable[[str, int, int], Example]  # task, seed, filler

TASKS: dict[str, Build] = dict.fromkeys(needles.TASKS, needles.make_needles)
GROUPS: dict[str, tuple[str, ...]] = {
    "needles": tuple(needles.TASKS),
}


def task_names(words: Iterable[str]) -> list[str]:
    """Tasks by their own names or their groups', each once, in order.

    Raises:
      ValueError: a name of neither.
    """
    names: list[str] = []
    for word in words:
        if word not in GROUPS and word not in TASKS:
            raise ValueError(f"unknown task {word!r}; use one of {', '.join([*GROUPS, *TASKS])}")
        names += GROUPS.get(word, (word,))
    return list(dict.fromkeys(names))


def make_example(
    task: str, length: int, tokenizer: Tokenizer, seed: int = 0, frame: ChatFrame | None = None
) -> Example:
    """An example of a task whose context, questions and answers take `length` tokens, or a little less.

    Args:
      task: one of `TASKS`.
      length: tokens, with room for the answers; filler comes in pieces, and what does not fit whole is left out.
      tokenizer: counts them.
      seed: decides everything that is drawn.
      frame: the chat that will stand around it, see `chat_frame`; its tokens count.

    Raises:
      ValueError: an unknown task, or a length in which the task does not fit.

    Example:
      >>> from streamjax.data import ByteTokenizer
      >>> example = make_example("niah_single_1", 2000, ByteTokenizer(), seed=3)
      >>> example.context.count(example.answers[0])
      1
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    return fitted(lambda filler: TASKS[task](task, seed, filler), length, tokenizer, frame)
