"""RULER's questions about documents (2404.06654), over files that a user has: SQuAD 2.0 and HotpotQA.

The answer's document lies among others, as many as fit. "qa_1" reads `squad.json` (or `dev-v2.0.json`), "qa_2" reads
`hotpotqa.json` (or `hotpot_dev_distractor_v1.json`) in a folder; neither is shipped. 32 tokens for an answer, which
counts if it contains one of the accepted ones. The words around the documents are our own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamjax.checkpoints import user_path
from streamjax.data.ruler.example import Example, Turn

FILES = {"qa_1": ("squad.json", "dev-v2.0.json"), "qa_2": ("hotpotqa.json", "hotpot_dev_distractor_v1.json")}
ANSWER_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, what is accepted, the documents that it needs, and those of the same page, which come first."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


def find_file(task: str, folder: str | Path | None) -> Path:
    """The file of a task.

    Raises:
      ValueError: no folder is given, or it has none of the file's names.
    """
    names = " or ".join(FILES[task])
    if folder is None:
        raise ValueError(f"task {task!r} asks about documents that are not shipped: give a folder with {names}")
    found = [path for name in FILES[task] if (path := user_path(folder) / name).is_file()]
    if not found:
        raise ValueError(f"{folder}: no {names}, which task {task!r} asks about")
    return found[0]


def make_question(task: str, seed: int, folder: str | Path | None, filler: int) -> Example:
    """An example with so many documents, at least those that the question needs."""
    asked, documents = read_file(task, find_file(task, folder))
    draw = random.Random(f"{task} {seed}")
    order = list(range(len(asked)))
    draw.shuffle(order)
    question = asked[order[seed % len(asked)]]
    chosen = list(question.needed)
    near = [i for i in question.near if i not in chosen]
    draw.shuffle(near)
    others = [i for i in range(len(documents)) if i not in set(chosen + near)]
    draw.shuffle(others)
    chosen += (near + others)[: max(filler - len(chosen), 0)]
    # The same places at any number of documents: each has a number of its own by which they stand.
    texts = [documents[i] for i in sorted(chosen, key=lambda i: random.Random(f"{seed} {i}").random())]
    context = "Below are documents, and behind them a question that one or more of them answer.\n\n"
    context += "\n\n".join(f"Document {place}:\n{text}" for place, text in enumerate(texts, 1))
    turn = Turn(
        f"\n\nAnswer the question by the documents, with the answer alone.\n\nQuestion: {question.question}",
        " Answer:",
        question.answers,
        ANSWER_TOKENS,
        "any",
    )
    return Example(task, context, (turn,))


@functools.lru_cache(maxsize=2)
def read_file(task: str, path: Path) -> tuple[list[Asked], list[str]]:
    """The questions of a file and its documents.

    Raises:
      ValueError: a file of another form.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = list(_squad(data) if task == "qa_1" else _hotpot(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = "SQuAD 2.0" if task == "qa_1" else "HotpotQA"
        raise ValueError(f"{path}: not a file of {form}: {type(error).__name__} {error}") from None
    if not found:
        raise ValueError(f"{path}: no question with an answer")
    texts = sorted({text for _, _, needed, near in found for text in (*needed, *near)})
    places = {text: place for place, text in enumerate(texts)}
    asked = [
        Asked(question, answers, tuple(places[t] for t in needed), tuple(places[t] for t in near))
        for question, answers, needed, near in found
    ]
    return asked, texts


Found = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def _squad(data: Any) -> Iterator[Found]:
    for page in data["data"]:
        texts = [paragraph["context"] for paragraph in page["paragraphs"]]
        for paragraph in page["paragraphs"]:
            near = tuple(text for text in texts if text != paragraph["context"])
            for entry in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                if answers and not entry.get("is_impossible", False):
                    yield entry["question"], answers, (paragraph["context"],), near


def _hotpot(data: Any) -> Iterator[Found]:
    for entry in data:
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
        yield entry["question"], (entry["answer"],), documents, ()
