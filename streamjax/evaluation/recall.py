"""Does a model find in a long stream what was said there? Accuracy by length and depth, for several caches."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from streamjax.data.recall.chat_frames import ChatFrame, chat_frame
from streamjax.data.recall.phrasings import USUAL_HAYSTACK, default_phrasing
from streamjax.data.recall.tasks import Problem, encode_question, make_problem, stream_context
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.kv.presets.registry import Built
from streamjax.models.decoder import Decoder
from streamjax.models.nonfinite import not_finite
from streamjax.streaming import StreamState, init_state, read, step
from streamjax.streaming.step import require_room

Progress = Callable[[int], None]  # tokens of the context that were read, in each row


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task at one length and depth under one cache.

    right, asked: questions that were answered to the letter, and all. seconds: of reading the context, without
    compilation. cache_bytes: of one stream's state.
    """

    task: str
    cache: str
    length: int
    depth: float
    right: int
    asked: int
    seconds: float
    tokens_per_second: float
    cache_bytes: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    def to_json_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "accuracy": self.accuracy}


def run_recall(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    cache: Built,
    *,
    task: str,
    length: int,
    depths: Sequence[float],
    samples: int,
    haystack: str | None = None,
    needles: int = 4,
    phrasing: str | None = None,
    batch_size: int = 8,
    chunk_size: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Cell]:
    """Ask a model, `samples` times at each depth, about contexts of `length` tokens that it has streamed.

    An answer counts if greedy decoding gives every token of it. It is found without decoding: each token of the answer
    must be the likeliest behind those before it. Later questions of a problem find the earlier ones, with their right
    answers, in the stream.

    Args:
      model, tokenizer: what is asked.
      name, cache: under which cache, and what to call it.
      task, needles: see `make_problem`.
      length: tokens of the context, without the question.
      haystack: see `sentences`; the usual one of the phrasing where None.
      phrasing: one of `PHRASINGS`; `default_phrasing` where None. With "ruler" a model is asked through its own chat
        template, if it has one.
      depths: where what is asked for stands, 0 (the start) to 1.
      samples: problems at each depth.
      batch_size: problems that are read side by side.
      chunk_size: tokens a step.
      seed: of the problems; they are the same for every cache.
      progress: is called with tokens as they are read.

    Returns:
      A cell a depth.
    """
    phrasing = phrasing or default_phrasing(tokenizer)
    haystack = haystack or USUAL_HAYSTACK.get(phrasing, "words")
    frame = chat_frame(tokenizer) if phrasing == "ruler" else None
    keys = [(depth, seed * samples + sample) for depth in depths for sample in range(samples)]
    right: dict[float, int] = dict.fromkeys(depths, 0)
    asked: dict[float, int] = dict.fromkeys(depths, 0)
    seconds, speeds, size = 0.0, [], 0
    for batch in _batched(keys, batch_size):
        problems = [make_problem(task, depth, number, haystack, needles, phrasing) for depth, number in batch]
        rows = problems + problems[:1] * (batch_size - len(problems))  # one program for all batches
        state = init_state(model, cache, batch_size)
        size = state.cache_bytes // batch_size
        start = time.perf_counter()
        state, slow = _read(model, state, rows, length, tokenizer, frame, chunk_size, progress)
        jax.block_until_ready(state.hidden)
        spent = time.perf_counter() - start
        seconds += spent
        speeds.append(len(batch) * (length - slow[0]) / max(spent - slow[1], 1e-9))
        for found, problem, (depth, _) in zip(
            _ask(model, state, rows, tokenizer, frame), problems, batch, strict=False
        ):
            right[depth] += sum(found)
            asked[depth] += len(problem.questions)
    speed = float(np.median(speeds))
    return [
        Cell(task, name, length, depth, right[depth], asked[depth], seconds / len(depths), speed, size)
        for depth in depths
    ]


def _batched(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def _read(
    model: Decoder,
    state: StreamState,
    problems: Sequence[Problem],
    length: int,
    tokenizer: Tokenizer,
    frame: ChatFrame | None,
    chunk_size: int,
    progress: Progress | None,
) -> tuple[StreamState, tuple[int, float]]:
    """Stream the contexts, never whole in memory; tokens and seconds of the first piece, which compiles, apart."""
    streams = [_pieces(stream_context(problem, length, tokenizer, frame), 16 * chunk_size) for problem in problems]
    slow = (0, 0.0)
    for index, pieces in enumerate(zip(*streams, strict=True)):
        start = time.perf_counter()
        state = read(model, state, np.stack(pieces), chunk_size)
        if index == 0 and length > len(pieces[0]):
            jax.block_until_ready(state.hidden)
            slow = (len(pieces[0]), time.perf_counter() - start)
        if progress is not None:
            jax.block_until_ready(state.hidden)
            progress(len(pieces[0]))
    return state, slow


def _pieces(blocks: Iterator[Int32[np.ndarray, " N"]], size: int) -> Iterator[Int32[np.ndarray, " N"]]:
    """The same tokens in pieces of `size`, but for the last."""
    held = np.zeros(0, np.int32)
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


def _ask(
    model: Decoder,
    state: StreamState,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    frame: ChatFrame | None = None,
) -> list[list[bool]]:
    """Which questions of each problem are answered to the letter."""
    found: list[list[bool]] = [[] for _ in problems]
    for turn, questions in enumerate(itertools.zip_longest(*(problem.questions for problem in problems))):
        assert None not in questions, "problems of one task have equally many questions"
        prompts = [None if frame is None else frame.prompt(q, turn == 0) for q in questions]
        pairs = [encode_question(tokenizer, q, prompt) for q, prompt in zip(questions, prompts, strict=True)]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        tokens = np.zeros((len(pairs), -(-width // 32) * 32), np.int32)
        counts = np.array([len(prompt) + len(answer) for prompt, answer in pairs], np.int32)
        for row, (prompt, answer) in enumerate(pairs):
            tokens[row, : counts[row]] = prompt + answer
        require_room(state, counts)
        state, logits = step(model, state, tokens, jnp.asarray(counts))
        likeliest, best = jax.device_get((jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1)))
        for row, count in enumerate(counts):
            if not np.isfinite(best[row, :count]).all():
                raise not_finite(model, tokens[row, :count])
        for row, (prompt, answer) in enumerate(pairs):
            first = len(prompt) - 1
            found[row].append(likeliest[row, first : first + len(answer)].tolist() == answer)
    return found
