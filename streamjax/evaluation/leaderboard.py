"""Caches on tasks of long contexts: what a model answers under each, what it makes of a text, and what that takes.

A cache is tried at one of two moments. "stream": it holds the stream from the first token on. "prompt": the context is
read into a dense cache, which is compacted when the question comes (`sj.compact`); so methods are published that
compress a prompt, and so kvpress runs them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.ruler import Example, Turn, encode_example, score
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import Built
from streamjax.kv.scores.finch import Finch
from streamjax.kv.scores.kvzip import KVzip
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.models.decoder import Decoder
from streamjax.streaming import Sampler, StreamState, compact, generate_blocks, init_state, read, reconstruction
from streamjax.streaming.scan import score as score_stream

Moment = Literal["stream", "prompt"]
MOMENTS: tuple[str, ...] = get_args(Moment)
Progress = Callable[[int], None]
_REPEAT = "\n\nRepeat the text above, word for word.\n\n"  # what KVzip asks of a model
_ASKED = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example in ids: its context, and each question with the answer's beginning."""

    example: Example
    context: list[int]
    prompts: list[list[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, example: Example, frame: ChatFrame | None = None) -> Encoded:
        return cls(example, *encode_example(tokenizer, example, frame))

    @property
    def room(self) -> int:
        """Tokens of the questions and the answers."""
        return sum(map(len, self.prompts)) + sum(turn.answer_tokens for turn in self.example.turns)


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
    model: Decoder,
    tokenizer: Tokenizer,
    cache: Built,
    examples: Sequence[Encoded],
    *,
    moment: Moment = "stream",
    batch_size: int = 8,
    chunk_size: int = 512,
    answer_tokens: int | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Let a model read each example's context under a cache, and answer its questions, greedily.

    Args:
      model, tokenizer: what is asked.
      cache: at `moment`; see the module.
      examples: of one task, or of several; batches are filled with copies, so that there is one program for all.
      batch_size: contexts side by side.
      chunk_size: tokens a step.
      answer_tokens: no answer is longer, whatever its task allows.
      progress: is told how many examples are done, after each batch.
    """
    said: list[list[str]] = []
    reads, writes = [], []
    for start in range(0, len(examples), batch_size):
        batch = list(examples[start : start + batch_size])
        rows = batch + batch[:1] * (batch_size - len(batch))
        began = time.perf_counter()
        state = read_contexts(model, tokenizer, cache, rows, moment, chunk_size)
        jax.block_until_ready(state.hidden)
        reads.append(sum(len(row.context) for row in rows) / (time.perf_counter() - began))
        began = time.perf_counter()
        texts, written = _ask(model, tokenizer, state, rows, chunk_size, answer_tokens)
        writes.append(written / (time.perf_counter() - began))
        said += texts[: len(batch)]
        if progress is not None:
            progress(len(batch))
    scores = [
        statistics.fmean(score(turn, text) for turn, text in zip(encoded.example.turns, texts, strict=True))
        for encoded, texts in zip(examples, said, strict=True)
    ]
    return Answers(said, scores, statistics.median(reads[1:] or reads), statistics.median(writes[1:] or writes))


def read_contexts(
    model: Decoder, tokenizer: Tokenizer, cache: Built, rows: Sequence[Encoded], moment: Moment, chunk_size: int
) -> StreamState:
    """The streams' states behind their contexts."""
    contexts = [row.context for row in rows]
    if moment == "stream":
        return read(model, init_state(model, cache, len(rows)), contexts, chunk_size)
    state = init_state(model, wholly(cache, max(map(len, contexts)), chunk_size), len(rows))
    state = read(model, state, contexts, chunk_size)
    return compacted(model, tokenizer, state, cache, contexts, [row.prompts[0] for row in rows])


def wholly(cache: Built, capacity: int, chunk_size: int) -> Built:
    """A cache that keeps everything until it is compacted into `cache`, with what that wants to know of it by then."""
    if isinstance(cache, tuple):
        return tuple(_of_layer(each, capacity, chunk_size) for each in cache)
    return _of_layer(cache, capacity, chunk_size)


def _of_layer(cache: Cache, capacity: int, chunk_size: int) -> Cache:
    if not any(map(_needs_history, _scored(cache))) or _measures(cache):
        return Cascade(Full(capacity))
    cascade = cache.cascade if isinstance(cache, Budgeted) else cache
    assert isinstance(cascade, Cascade)

    # Attention must be noted as the context is read: a tier that never has to choose notes it.
    def larger(tier: Any) -> Any:
        if not isinstance(tier, Scored):
            return tier
        every = max(tier.every, chunk_size // tier.every * tier.every)
        return Scored(capacity, tier.score, tier.per_head, every, tier.distance)

    return Cascade(*map(larger, cascade.tiers))


def _scored(cache: Built) -> list[Scored]:
    caches = cache if isinstance(cache, tuple) else (cache,)
    cascades = [each.cascade if isinstance(each, Budgeted) else each for each in caches]
    return [tier for each in cascades if isinstance(each, Cascade) for tier in each.tiers if isinstance(tier, Scored)]


def _measures(cache: Built) -> bool:
    """Whether the prompt's own attention is to say how large a layer is."""
    return isinstance(cache, Budgeted) and cache.unmeasured


def _needs_history(tier: Scored) -> bool:
    """Whether a choice rests on all queries so far, and not on the last ones, or on those of a text of its own."""
    rule = tier.score
    if isinstance(rule, KVzip | Finch):
        return False
    return rule.needs_queries or (rule.needs_attention and rule.counts_all_queries)


def compacted(
    model: Decoder,
    tokenizer: Tokenizer,
    state: StreamState,
    cache: Built,
    contexts: Sequence[list[int]],
    prompts: Sequence[list[int]],
) -> StreamState:
    """The states under `cache`, by the queries that a method's paper takes.

    They are the context's last, all of it, its repetition (KVzip), or the question (Finch). Rows of several lengths are
    cut to the shortest of them, at their beginnings, where the query is more than the context's end.

    Args:
      model, tokenizer: that read the streams.
      state: behind the contexts, under `wholly(cache, ...)`.
      cache: the new one.
      contexts, prompts: what was read, and the questions that come next, in ids.
    """
    rules = [tier.score for tier in _scored(cache)]
    if any(isinstance(rule, KVzip) for rule in rules):
        asks = reconstruction(_cut(contexts), request=tokenizer.encode(_REPEAT, continues=True))
        return compact(model, state, cache, queries=asks)
    if any(isinstance(rule, Finch) for rule in rules):
        return compact(model, state, cache, _cut(prompts), stored=False)
    if any(map(_needs_history, _scored(cache))):
        return compact(model, state, cache, _cut(contexts) if _measures(cache) else None)
    if not any(rule.needs_attention for rule in rules):
        return compact(model, state, cache)
    window = max(observed(rule) for rule in rules)
    return compact(model, state, cache, _cut([context[-window:] for context in contexts]))


def observed(rule: Any) -> int:
    """The last queries by which a score chooses: its `window`, or that of the score which it wraps, or the newest."""
    inner = getattr(rule, "score", None)
    return getattr(rule, "window", 1) if inner is None else observed(inner)


def _cut(rows: Sequence[list[int]]) -> np.ndarray:
    width = min(map(len, rows))
    return np.array([row[len(row) - width :] for row in rows], np.int32)


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
        tokens: list[list[int]] = [[] for _ in rows]
        texts = [""] * len(rows)
        blocks = generate_blocks(
            model,
            state,
            [row.prompts[index] for row in rows],
            max_new_tokens=max(budgets),
            sampler=Sampler(temperature=0),
            stop_tokens=stop,
            chunk_size=chunk_size,
        )
        for new_state, block in blocks:
            state = new_state
            for found, new in zip(tokens, block, strict=True):
                found += [int(token) for token in new if token >= 0]
            texts = [
                tokenizer.decode([token for token in found[:budget] if token not in stop])
                for found, budget in zip(tokens, budgets, strict=True)
            ]
            # A text that contains all the answers is right whatever follows it.
            if index == last and all(map(_settled, turns, texts)):
                break
        written += sum(map(len, tokens))
        for row, text in zip(said, texts, strict=True):
            row.append(text)
    return said, written


def _settled(turn: Turn, text: str) -> bool:
    return turn.rule != "ratio" and score(turn, text) == 1.0


def perplexity_behind(
    model: Decoder,
    tokenizer: Tokenizer,
    cache: Built,
    ids: Sequence[int],
    *,
    length: int,
    scored: int,
    moment: Moment = "stream",
    rows: int = 4,
    chunk_size: int = 512,
) -> float:
    """Perplexity of `scored` tokens behind `length` of a text, over `rows` stretches of it, one behind the other.

    Raises:
      ValueError: a text that is too short for one stretch.
    """
    width = length + scored
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
    state = read_contexts(model, tokenizer, cache, encoded, moment, chunk_size)
    _, nats = score_stream(model, state, [stretch[length:] for stretch in stretches], chunk_size)
    return float(np.exp(np.asarray(nats, np.float64).mean()))
