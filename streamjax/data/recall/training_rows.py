"""Rows to train recall on: facts and questions about them mixed into a haystack, the loss on the answers."""

from __future__ import annotations

import numpy as np

from streamjax.data.recall.haystack import KINDS, sentences
from streamjax.data.recall.phrasings import Question, key_fact, key_question, passkey_fact, passkey_question
from streamjax.data.recall.tasks import NAMES, encode_question, encode_sentence
from streamjax.data.text.tokenizers import Tokenizer

_ENDLESS = 2**31 - 1  # rows that a source says it has
TRAINED_TASKS = ("passkey", "multi_key")
_SPLITS = ("train", "validation", "test")


def open_recall(spec: str, split: str, seq_len: int, tokenizer: Tokenizer) -> RecallRows | None:
    """The rows of the data source "recall"; None for any other.

    "recall:passkey,multi_key" has some of its tasks alone, "recall::cut=64" cuts values as `RecallRows` says.

    Raises:
      ValueError: an unknown task or split, or another option than "cut".
    """
    name, _, rest = spec.partition(":")
    if name != "recall":
        return None
    tasks, _, option = rest.partition(":")
    cut = option.removeprefix("cut=") if option else "0"
    if not cut.isdecimal():
        raise ValueError(f"data source {spec!r}: its one option is written cut=TOKENS, not {option!r}")
    named = tuple(tasks.split(",")) if tasks else TRAINED_TASKS
    return RecallRows(seq_len, tokenizer, split, named, cut=int(cut))


class RecallRows:
    """A random-access source of training rows; row i is drawn from the seed and i alone.

    A row is a haystack with some facts, and behind each fact questions about it at drawn distances, the answer behind
    the question. What is no answer has `filler_weight`.

    Args:
      seq_len: T.
      tokenizer: of the model that is trained.
      split: "train", "validation" and "test" draw different rows.
      tasks: which kinds of facts; see `recall.py`.
      filler_weight: of tokens outside of answers.
      most: facts in a row, at most; in short rows one for every 128 tokens.
      cut: half of the facts stand so that a multiple of so many tokens falls between two tokens of their value: what is
        seldom otherwise, and hard for a memory in chunks. Nowhere in particular where 0.

    Raises:
      ValueError: an unknown task or split.
    """

    def __init__(
        self,
        seq_len: int,
        tokenizer: Tokenizer,
        split: str = "train",
        tasks: tuple[str, ...] = TRAINED_TASKS,
        filler_weight: float = 0.02,
        most: int = 6,
        cut: int = 0,
    ):
        unknown = sorted(set(tasks) - set(TRAINED_TASKS))
        if unknown or not tasks:
            raise ValueError(
                f"recall rows are made of {' and '.join(TRAINED_TASKS)}, not of {', '.join(unknown) or 'nothing'}"
            )
        if split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}: use one of {', '.join(_SPLITS)}")
        self._length, self._tokenizer, self._split = seq_len, tokenizer, _SPLITS.index(split)
        self._tasks, self._filler_weight, self._most, self._cut = tasks, filler_weight, most, cut

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, targets int32 [T], weights float32 [T]."""
        random = np.random.default_rng([self._split, index])
        facts, questions = self._facts(random)
        text = sentences(KINDS[int(random.integers(len(KINDS)))], random)
        tokenizer = self._tokenizer
        ids = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        weights = [self._filler_weight] * len(ids)
        begin = len(ids)
        pieces = self._order(random, facts, questions)
        spare = self._length + 1 - len(ids) - sum(len(found[0]) for found in pieces)
        gaps = np.diff(np.sort(random.integers(0, max(spare, 1), len(pieces))), prepend=0)
        for (piece, answer, value), gap in zip(pieces, gaps.tolist(), strict=True):
            filler: list[int] = []
            while len(filler) < gap or (not filler and len(ids) == begin):  # a sentence begins the row
                filler += encode_sentence(tokenizer, next(text), first=len(ids) + len(filler) == begin)
            if self._cut and len(value) > 1 and random.random() < 0.5:
                short = -(len(ids) + len(filler) + value[int(random.integers(1, len(value)))]) % self._cut
                last: list[int] = []
                while len(last) < short:
                    last += encode_sentence(tokenizer, next(text))
                filler += last[len(last) - short :]
            ids += filler + piece
            weights += [self._filler_weight] * (len(filler) + len(piece) - answer) + [1.0] * answer
        while len(ids) <= self._length:
            more = encode_sentence(tokenizer, next(text))
            ids += more
            weights += [self._filler_weight] * len(more)
        tokens = np.asarray(ids[: self._length + 1], np.int32)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "weights": np.asarray(weights[1 : self._length + 1], np.float32),
        }

    def _facts(self, random: np.random.Generator) -> tuple[list[str], list[Question]]:
        task = self._tasks[int(random.integers(len(self._tasks)))]
        values = [f"{value:05d}" for value in random.integers(0, 10**5, self._most)]
        if task == "passkey":
            return [passkey_fact(values[0])], [passkey_question(values[0])]
        count = int(random.integers(1, min(self._most, max(self._length // 128, 1)) + 1))
        names = [NAMES[i] for i in random.permutation(len(NAMES))[:count]]
        pairs = list(zip(names, values, strict=False))
        return [key_fact(*pair) for pair in pairs], [key_question(*pair) for pair in pairs]

    def _order(
        self, random: np.random.Generator, facts: list[str], questions: list[Question]
    ) -> list[tuple[list[int], int, range]]:
        """Facts and questions as they follow each other: ids, how many of these are the answer, a fact's value."""
        budget, places = self._length // 2, []  # half of the row is haystack
        for fact, question in zip(facts, questions, strict=True):
            at = random.random() * 0.7
            before, value, _ = fact.partition(question.answer.strip(" ."))
            start = len(encode_sentence(self._tokenizer, before + value[0])) - 1
            stands = range(start, len(encode_sentence(self._tokenizer, before + value)))
            places.append((at, encode_sentence(self._tokenizer, fact), 0, stands))
            budget -= len(places[-1][1])
        while budget > 0:
            i = int(random.integers(len(facts)))
            at = places[i][0] + (1.0 - places[i][0]) * random.random()
            prompt, answer = encode_question(self._tokenizer, questions[i])
            more = (at, prompt + answer, len(answer), range(0))
            places.append(more)
            budget -= len(more[1])
        return [(ids, answer, stands) for _, ids, answer, stands in sorted(places, key=lambda place: place[0])]
