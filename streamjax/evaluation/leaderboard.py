"""Caches on tasks of long contexts: what a model answers under each, what it makes of a text, and what that takes.

A cache is tried at one of two moments. "stream": it holds the stream from the first token on. "prompt": the context is
read into a dense cache, which is compacted when the question comes (`sj.compact`); so methods are published that
compress a prompt, and so kvpress runs them.

On CPUs answers are written layer by layer: there the compiler would take longer for each cache's decoding than the few
tokens take (`streamjax.streaming.by_layer.writing`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from streamjax.data.ruler import Example, Turn, score
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation.context_states import ContextReader, Encoded
from streamjax.kv.presets.registry import Built
from streamjax.models.decoder import Decoder
from streamjax.streaming import Sampler, StreamState, generate_blocks
from streamjax.streaming.by_layer.writing import Enough, write_layerwise
from streamjax.streaming.scan import score as score_stream
from streamjax.streaming.token_rows import Rows

Progress = Callable[[int], None]
_ASKED = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was said to each example's questions, and its score in [0, 1].

    Tokens a second are of reading contexts, compaction included, and of writing answers; medians over batches without
    the first one, which compiles, where there are others.
    """

    said: list[list[str]]
    scores: list[float]
    read_per_second: float
    written_per_second: float


def answer(
    reader: ContextReader,
    cache: Built,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 8,
    answer_tokens: int | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Let a model read each example's context under a cache, and answer its questions, greedily.

    Args:
      reader: the model that is asked, and the moment at which `cache` begins.
      cache: what it reads into, or what its context is compacted into.
      examples: of one task, or of several; batches are filled with copies, so that there is one program for all.
      batch_size: contexts side by side.
      answer_tokens: no answer is longer, whatever its task allows.
      progress: is told how many examples are done, after each batch.
    """
    said: list[list[str]] = []
    reads, writes = [], []
    for start in range(0, len(examples), batch_size):
        batch = list(examples[start : start + batch_size])
        rows = batch + batch[:1] * (batch_size - len(batch))
        state, seconds = reader.read(cache, rows)
        reads.append(sum(len(row.context) for row in rows) / seconds)
        began = time.perf_counter()
        texts, written = _ask(reader.model, reader.tokenizer, state, rows, reader.chunk_size, answer_tokens)
        writes.append(written / (time.perf_counter() - began))
        said += texts[: len(batch)]
        if progress is not None:
            progress(len(batch))
    scores = [
        statistics.fmean(score(turn, text) for turn, text in zip(encoded.example.turns, texts, strict=True))
        for encoded, texts in zip(examples, said, strict=True)
    ]
    return Answers(said, scores, statistics.median(reads[1:] or reads), statistics.median(writes[1:] or writes))


def _ask(
    model: Decoder,
    tokenizer: Tokenizer,
    state: StreamState,
    rows: Sequence[Encoded],
    chunk_size: int,
    answer_tokens: int | None,
) -> tuple[list[list[str]], int]:
    """Each row's answers, one question after another in the stream, and how many tokens were written in all."""
    said: list[list[str]] = [[] for _ in rows]
    written, last = 0, len(rows[0].prompts) - 1
    most = math.inf if answer_tokens is None else answer_tokens
    stop = tuple(token for token in tokenizer.eos_ids if token < model.config.vocab_size)
    for index in range(last + 1):
        turns = [row.example.turns[index] for row in rows]
        budgets = [int(min(turn.answer_tokens, most)) for turn in turns]
        texts = partial(_text, tokenizer, budgets, stop)
        enough = partial(_already_right, turns, texts) if index == last else None
        prompts = [row.prompts[index] for row in rows]
        state, tokens = _write(model, state, prompts, max(budgets), stop, chunk_size, enough)
        written += sum(map(len, tokens))
        for i, (row, found) in enumerate(zip(said, tokens, strict=True)):
            row.append(texts(i, found))
    return said, written


def _write(
    model: Decoder, state: StreamState, prompts: Rows, most: int, stop: tuple[int, ...], chunk_size: int,
    enough: Enough | None,
) -> tuple[StreamState, list[list[int]]]:  # fmt: skip
    """The likeliest continuations, to a stop token, to `most` tokens, or as far as is enough."""
    if model.by_layers and jax.default_backend() == "cpu":
        return write_layerwise(
            model, state, prompts, max_new_tokens=most, stop_tokens=stop, chunk_size=chunk_size, enough=enough
        )
    tokens: list[list[int]] = [[] for _ in prompts]
    blocks = generate_blocks(
        model, state, prompts, max_new_tokens=most, sampler=Sampler(temperature=0), stop_tokens=stop,
        chunk_size=chunk_size,
    )  # fmt: skip
    for new_state, block in blocks:
        state = new_state
        for found, new in zip(tokens, block, strict=True):
            found += [int(token) for token in new if token >= 0]
        if enough is not None and all(map(enough, range(len(tokens)), tokens)):
            break
    return state, tokens


def _text(tokenizer: Tokenizer, budgets: Sequence[int], stop: tuple[int, ...], row: int, tokens: list[int]) -> str:
    return tokenizer.decode([token for token in tokens[: budgets[row]] if token not in stop])


def _already_right(turns: Sequence[Turn], texts: Callable[[int, list[int]], str], row: int, tokens: list[int]) -> bool:
    """A text that contains all the answers is right whatever follows it."""
    return turns[row].rule != "ratio" and score(turns[row], texts(row, tokens)) == 1.0


def perplexity_behind(
    reader: ContextReader, cache: Built, ids: Sequence[int], *, length: int, scored: int, rows: int = 4
) -> float:
    """Perplexity of `scored` tokens behind `length` of a text, over `rows` stretches of it, one behind the other.

    Raises:
      ValueError: a text that is too short for one stretch.
    """
    width = length + scored
    tokenizer = reader.tokenizer
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    rows = min(rows, len(ids) // width)
    if not rows:
        raise ValueError(f"the text has {len(ids):,} tokens: perplexity behind {length:,} needs {width:,}")
    stretches = [[*begin, *ids[row * width : (row + 1) * width - len(begin)]] for row in range(rows)]
    # Finch's question is the context's end here: a text has no other.
    encoded = [
        Encoded(Example("text", "", ()), stretch[:length], [stretch[max(length - _ASKED, 0) : length]])
        for stretch in stretches
    ]
    state, _ = reader.read(cache, encoded)
    _, nats = score_stream(reader.model, state, [stretch[length:] for stretch in stretches], reader.chunk_size)
    return float(np.exp(np.asarray(nats, np.float64).mean()))
