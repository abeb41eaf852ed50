"""Data for configs/sft.py, configs/dpo.py and configs/grpo.py: small, drawn, the same every time.

`sft` has questions about sums and the opposites of words, answered in JSON. `dpo` has the same questions with a short
answer that is preferred to a wordy one. `grpo` has digits to be repeated, and `digits_in_place` rewards how many are.
Questions of `validation.jsonl` are not in `train.jsonl`.

    python -m benchmarks.training.post_training_data --folder=runs/data
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamjax.training import Answer

OPPOSITES = (
    "hot cold", "big small", "up down", "early late", "open closed", "day night", "wet dry", "young old", "fast slow",
    "hard soft", "left right", "light dark", "full empty", "high low", "rich poor", "loud quiet", "near far",
    "strong weak", "win lose", "buy sell",
)  # fmt: skip
HELD_OUT = 6  # of how many questions one is held out
DIGITS = 4


def questions() -> list[tuple[str, str]]:
    """Questions with their answers."""
    sums = [(f"What is {a} plus {b}?", str(a + b)) for a, b in itertools.product(range(1, 10), repeat=2)]
    words = [pair.split() for pair in OPPOSITES]
    words += [pair[::-1] for pair in words]
    return sums + [(f'What is the opposite of "{one}"?', other) for one, other in words]


def sft() -> Iterator[dict[str, Any]]:
    for question, answer in questions():
        yield {"messages": [_user(question), _assistant(json.dumps({"answer": answer}))]}


def dpo() -> Iterator[dict[str, Any]]:
    for question, answer in questions():
        wordy = f"That is a great question! Let me think about it. The answer to your question is {answer}."
        yield {"prompt": [_user(question)], "chosen": [_assistant(answer)], "rejected": [_assistant(wordy)]}


def grpo() -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for digits in draw.sample(list(itertools.product("0123456789", repeat=DIGITS)), 600):
        system = {"role": "system", "content": "Repeat the digits."}
        yield {"prompt": [system, _user(" ".join(digits))], "reference": " ".join(digits)}


def digits_in_place(answers: Sequence[Answer]) -> list[float]:
    """A reward: the share of the reference's digits that an answer has in their places; digits too many count against.

    Exact match alone tells a model nothing while no answer of a group is right.
    """
    found = []
    for answer in answers:
        wanted = [character for character in answer.record["reference"] if character.isdecimal()]
        said = [character for character in answer.text if character.isdecimal()]
        right = sum(one == other for one, other in zip(wanted, said, strict=False))
        found.append(right / max(len(wanted), len(said)))
    return found


def write(folder: Path) -> None:
    """All three, each a folder with train.jsonl and validation.jsonl."""
    for make in (sft, dpo, grpo):
        records = list(make())
        random.Random(1).shuffle(records)
        held_out = len(records) // HELD_OUT
        _write(folder / make.__name__ / "validation.jsonl", records[:held_out])
        _write(folder / make.__name__ / "train.jsonl", records[held_out:])


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _write(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/data"))
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
