"""Contexts that streams have read, under the caches that a leaderboard tries: from the first token on, or compacted.

What is read into a cache that keeps everything does not depend on the cache that it is compacted into. So contexts are
read once for many caches, and repeated once for all that choose by their repetition; these states are kept as far as
there is room. Their sizes are multiples of 256, so that tasks whose contexts differ by some tokens share programs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.ruler import Example, encode_example
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import Built
from streamjax.kv.scores.finch import Finch
from streamjax.kv.scores.kvzip import KVzip
from streamjax.kv.selective.noted import Noted, can_note
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.models.decoder import Decoder
from streamjax.streaming import StreamState, compact, init_state, read, reconstruction

Moment = Literal["stream", "prompt"]
MOMENTS: tuple[str, ...] = get_args(Moment)
_MULTIPLE = 256  # tokens
_REPEAT = "\n\nRepeat the text above, word for word.\n\n"  # what KVzip asks of a model


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example in ids: its context, and each question with the answer's beginning."""

    example: Example
    context: list[int]
    prompts: list[list[int]]

    @classmethod
    def from_example(cls, tokenizer: Tokenizer, example: Example, frame: ChatFrame | None = None) -> Encoded:
        return cls(example, *encode_example(tokenizer, example, frame))

    @property
    def room(self) -> int:
        """Tokens of the questions and the answers."""
        return sum(map(len, self.prompts)) + sum(turn.answer_tokens for turn in self.example.turns)


class ContextReader:
    """Reads contexts into states, and keeps those that are compacted for the next cache, the newest ones.

    Args:
      model, tokenizer: that read.
      moment: "stream" or "prompt"; see `streamjax.evaluation.leaderboard`. Only the latter has anything to keep.
      chunk_size: tokens a step.
      keep_bytes: of states that wait for other caches, in the host's memory; 0 keeps none.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        moment: Moment = "stream",
        chunk_size: int = 512,
        keep_bytes: int = 0,
    ):
        self.model, self.tokenizer, self.moment, self.chunk_size = model, tokenizer, moment, chunk_size
        self._keep_bytes = keep_bytes
        self._kept: dict[tuple[Built, tuple[tuple[int, ...], ...]], tuple[list[np.ndarray], list[Any], Any, float]] = {}

    def read(self, cache: Built, rows: Sequence[Encoded]) -> tuple[StreamState, float]:
        """The streams' state behind their contexts, and the seconds that it takes without what was kept."""
        contexts = [row.context for row in rows]
        if self.moment == "stream":
            return self._timed(lambda: self._read(cache, contexts))
        capacity = -(-max(map(len, contexts)) // _MULTIPLE) * _MULTIPLE
        whole, repeated = wholly(cache, capacity, self.chunk_size), with_repetition(cache, capacity)

        def all_read() -> tuple[StreamState, float]:
            return self._once(whole, contexts, lambda: self._timed(lambda: self._read(whole, contexts)))

        def laid_out(state: StreamState, new: Built) -> tuple[StreamState, float]:
            prompts = [row.prompts[0] for row in rows]
            return self._timed(lambda: compacted(self.model, self.tokenizer, state, new, contexts, prompts))

        def all_repeated() -> tuple[StreamState, float]:
            assert repeated is not None
            state, seconds = all_read()
            new, more = laid_out(state, repeated)
            return new, seconds + more

        if repeated is None:
            state, seconds = all_read()
            new, more = laid_out(state, cache)
        else:
            state, seconds = self._once(repeated, contexts, all_repeated)
            new, more = self._timed(lambda: compact(self.model, state, cache))
        return new, seconds + more

    def _once(
        self, whole: Built, contexts: Sequence[list[int]], make: Callable[[], tuple[StreamState, float]]
    ) -> tuple[StreamState, float]:
        """These contexts' state under `whole`, and its seconds, as `make` gives them where they are not kept."""
        key = whole, tuple(map(tuple, contexts))
        if key in self._kept:
            leaves, places, structure, seconds = self._kept[key] = self._kept.pop(key)  # the newest, last
            state = jax.tree.unflatten(structure, jax.device_put(leaves, places))
        else:
            state, seconds = make()
            arrays, structure = jax.tree.flatten(state)
            places = [array.sharding for array in arrays]
            self._kept[key] = jax.device_get(arrays), places, structure, seconds
        while sum(leaf.nbytes for leaves, *_ in self._kept.values() for leaf in leaves) > self._keep_bytes:
            del self._kept[next(iter(self._kept))]
        return state, seconds

    def _read(self, cache: Built, contexts: Sequence[list[int]]) -> StreamState:
        return read(self.model, init_state(self.model, cache, len(contexts)), contexts, self.chunk_size)

    @staticmethod
    def _timed(make: Callable[[], StreamState]) -> tuple[StreamState, float]:
        began = time.perf_counter()
        state = jax.block_until_ready(make())
        return state, time.perf_counter() - began


def wholly(cache: Built, capacity: int, chunk_size: int) -> Built:
    """A cache that keeps everything until it is compacted into `cache`, with what that wants to know of it by then."""
    if isinstance(cache, tuple):
        return tuple(_of_layer(each, capacity, chunk_size) for each in cache)
    return _of_layer(cache, capacity, chunk_size)


def with_repetition(cache: Built, capacity: int) -> Cascade | None:
    """A cascade that keeps everything with what KVzip says of it, for a cache that chooses by that; None for others."""
    cascade = cache.cascade if isinstance(cache, Budgeted) else cache
    scored = _scored(cache)
    if not isinstance(cascade, Cascade) or _measures(cache) or not scored:
        return None
    if not all(isinstance(tier.score, KVzip) for tier in scored):
        return None
    first = cascade.tiers.index(scored[0])
    return Cascade(*cascade.tiers[:first], _noting(scored[0], capacity, scored[0].every))


def _noting(tier: Scored, capacity: int, every: int) -> Scored:
    """A tier that never has to choose, and notes what a tier with its score wants to know."""
    return Scored(capacity, tier.score, tier.per_head, every, tier.distance)


def _of_layer(cache: Cache, capacity: int, chunk_size: int) -> Cache:
    if not any(map(_needs_history, _scored(cache))) or _measures(cache):
        return Cascade(Full(capacity))
    cascade = cache.cascade if isinstance(cache, Budgeted) else cache
    assert isinstance(cascade, Cascade)

    tellers = {tier.score for tier in _scored(cache)}
    if len(tellers) == 1 and can_note(score := tellers.pop()) and all(t.distance is None for t in _scored(cache)):
        return Cascade(Noted(capacity, score))

    # Attention must be noted as the context is read: a tier that never has to choose notes it.
    def larger(tier: Any) -> Any:
        if not isinstance(tier, Scored):
            return tier
        return _noting(tier, capacity, max(tier.every, chunk_size // tier.every * tier.every))

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
