"""`SimultaneousStreams`: streams whose source is read and whose output is written at once, for a server.

Each is a source and an output in groups of their own (`streaming/simultaneous`), written by wait-k. They are no rows of
the engine's batch, whose streams have one order. They are computed beside it, one after another in one thread: a step
reads what is due of a source and writes one token.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.serving.admission import nbytes, require_possible
from streamjax.serving.decoding import Drawn, draw, no_choices, noted, put_choice
from streamjax.serving.jobs import Job
from streamjax.serving.loop import logprobs_of
from streamjax.serving.requests import Event, FinishReason, Overloaded, Request, Usage
from streamjax.serving.row_sampling import RowSampling, one_row
from streamjax.streaming.simultaneous.groups import Group, GroupedState, advance_group, init_groups

_NARROW = 16  # tokens; narrower chunks take as long


@partial(jax.jit, donate_argnames="groups", static_argnames="group")
def _read(
    model: Decoder, groups: GroupedState, tokens: Int32[Array, "1 C"], count: Int32[Array, " 1"], group: Group
) -> GroupedState:
    return advance_group(model, groups, tokens, count, group)[0]


@partial(jax.jit, donate_argnames=("groups", "rows"))
def _write(
    model: Decoder, groups: GroupedState, rows: RowSampling, token: Int32[Array, "1 1"]
) -> tuple[GroupedState, RowSampling, Drawn]:
    """Read the output's newest token, and draw the next one. How it is chosen is data: no request compiles anything."""
    groups, hidden = advance_group(model, groups, token, None, "output")
    used, one = groups.output.used, jnp.ones(1, bool)
    assert used is not None
    choice, alive, bad = draw(model.logits(hidden)[:, 0], rows, used, one)
    rows, none = noted(rows, choice.token, alive), jnp.zeros(1, jnp.int32)
    return groups, rows, Drawn(*put_choice(no_choices(rows, 1), choice, alive, jnp.int32(0)), bad, none, ~one[0])


class SimultaneousStreams:
    """At most so many streams at a time that answer while they are read.

    Attributes:
      capacity: tokens of a source, and of an output, where the cache has an end. stream_bytes: of one stream. widths:
      of the chunks that are read.

    Args:
      model, tokenizer: which belong together.
      cache: of either group, made of `Full`, `Window` and `Sink`. Under one without an end the groups stand at most as
        many positions apart as the cache has slots (`distance` of `init_groups`).
      most: streams at a time; more are told to come again.
      chunk_size: source tokens a step.
      dtype: as in `init_groups`.

    Raises:
      ValueError: numbers out of range, another cache, or a model whose tokens have one order.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        cache: Cache | Sequence[Cache],
        most: int,
        chunk_size: int = 64,
        dtype: DTypeLike | None = None,
    ):
        for name, value in (("most", most), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.tokenizer, self.most, self.chunk_size = model, tokenizer, most, chunk_size
        self._cache, self._dtype = cache, dtype
        self._open, self._lock = 0, threading.Lock()
        shapes = jax.eval_shape(self.begin)
        self.capacity, self.stream_bytes = shapes.source.capacity, nbytes(shapes)
        self.widths = tuple(sorted({1, min(_NARROW, chunk_size), chunk_size}))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "simultaneous")

    def begin(self) -> GroupedState:
        """Groups that hold nothing."""
        groups = init_groups(self.model, self._cache, dtype=self._dtype)
        if groups.source.capacity is None:
            slots = max(cache.slots for cache in groups.source.caches)
            groups = init_groups(self.model, self._cache, distance=slots, dtype=self._dtype)
        return GroupedState(groups.source, groups.output.noting_used(self.model.config.vocab_size))

    def open(self, request: Request, before: Sequence[int], wait: int, between: int) -> SimultaneousStream:
        """A stream of its own, until it is closed.

        Args:
          request: how the output is written; its prompt is what the output begins with.
          before: ids that the source begins with, which are not waited for.
          wait, between: source tokens in front of the first output token, and between two of them.

        Raises:
          Overloaded: there are as many as there may be.
          ValueError: a request that cannot be served.
        """
        if request.constraint is not None or request.conversation is not None:
            raise ValueError("an answer that is written while its source comes has no form, and no conversation")
        require_possible(request, self.model.config.vocab_size)
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if self.capacity is not None and len(request.prompt) + request.max_new_tokens - 1 > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens of an answer: ask for fewer")
        with self._lock:
            if self._open >= self.most:
                raise Overloaded(1)
            self._open += 1
        return SimultaneousStream(self, request, before, wait, between)

    def closed(self) -> None:
        """A stream has been closed."""
        with self._lock:
            self._open -= 1

    def submit(self, work: Any, *args: Any) -> concurrent.futures.Future[Any]:
        """Do a stream's step, in its turn."""
        return self._thread.submit(work, *args)

    def read(self, groups: GroupedState, tokens: Sequence[int], group: Group) -> GroupedState:
        """Read tokens of one group, in chunks of few widths."""
        for start in range(0, len(tokens), self.chunk_size):
            piece = tokens[start : start + self.chunk_size]
            row = np.zeros((1, next(width for width in self.widths if width >= len(piece))), np.int32)
            row[0, : len(piece)] = piece
            groups = _read(self.model, groups, jnp.asarray(row), jnp.asarray([len(piece)], jnp.int32), group)
        return groups

    def warm_up(self) -> None:
        """Compile every program, so that no client waits for that."""
        groups = self.begin()
        for group in ("source", "output"):
            for width in self.widths:
                groups = _read(self.model, groups, jnp.zeros((1, width), jnp.int32), jnp.zeros(1, jnp.int32), group)
        request = Request((0,), 1)
        _write(self.model, groups, _as_rows(request, self.model.config.vocab_size), jnp.zeros((1, 1), jnp.int32))

    def close(self) -> None:
        """End the thread; steps that have not begun are not done."""
        self._thread.shutdown(cancel_futures=True)


class SimultaneousStream:
    """One stream: fed with a source, and asked step by step for the output. See `SimultaneousStreams.open`.

    It is fed between steps, not meanwhile.

    Attributes:
      ended: whether the output has.
    """

    def __init__(self, streams: SimultaneousStreams, request: Request, before: Sequence[int], wait: int, between: int):
        self._streams, self._request = streams, request
        self._waiting, self._free, self._read = list(before), len(before), 0
        self._wait, self._between = wait, between
        self._events: list[Event] = []
        vocab = streams.model.config.vocab_size
        self._job = Job(request, streams.tokenizer, streams.chunk_size, self._events.append, lambda job: None, vocab)
        self._job.begin(0, ())
        self._fed = list(request.prompt)
        self._groups: GroupedState | None = None
        self._rows: RowSampling | None = None
        self.ended = False

    def feed(self, ids: Sequence[int]) -> None:
        """More of the source.

        Raises:
          ValueError: more than the cache has room for; nothing has been taken then.
        """
        capacity, held = self._streams.capacity, self._read + len(self._waiting)
        if capacity is not None and held + len(ids) > capacity:
            raise ValueError(f"the cache holds {capacity} tokens of a source: {held} came and {len(ids)} do not fit")
        self._waiting += ids

    def due(self, whole: bool) -> bool:
        """Whether the next output token may be written; `whole`: the source has ended."""
        return not self.ended and (whole or self._read + len(self._waiting) >= self._until)

    @property
    def _until(self) -> int:
        return self._free + self._wait + self._between * len(self._job.generated)

    def step(self) -> list[Event]:
        """Read what is due of the source, or all that there is, and write a token; what comes of it."""
        streams, job = self._streams, self._job
        if self._groups is None or self._rows is None:
            self._groups = streams.begin()
            self._rows = _as_rows(self._request, streams.model.config.vocab_size)
        count = max(self._until - self._read, 0)
        tokens, self._waiting = self._waiting[:count], self._waiting[count:]
        groups = streams.read(self._groups, tokens, "source")
        self._read += len(tokens)
        groups = streams.read(groups, self._fed[:-1], "output")
        self._groups, self._rows, drawn = _write(
            streams.model, groups, self._rows, jnp.asarray([self._fed[-1:]], jnp.int32)
        )
        found = jax.device_get(drawn)
        if found.bad[0]:
            self._end("error", "the model computed values that are not finite (NaN or infinity)")
        else:
            self._fed = [int(found.token[0, 0])]
            asked = self._request.logprobs
            job.push(self._fed, [] if asked is None else logprobs_of(found, 0, self._fed, asked))
            if job.stopped_by is not None:
                self._end("stop")
            elif len(job.generated) >= self._request.max_new_tokens:
                self._end("length")
        events = self._events[:]
        self._events.clear()
        return events

    def _end(self, reason: FinishReason, error: str | None = None) -> None:
        self.ended = True
        usage = Usage(self._read + len(self._request.prompt), 0, len(self._job.generated))
        self._events.append(dataclasses.replace(self._job.last_event(reason, error), usage=usage))

    def close(self) -> None:
        """Nobody wants the rest; its place is free."""
        self.ended = True
        self._groups = self._rows = None
        self._streams.closed()


def _as_rows(request: Request, vocab_size: int) -> RowSampling:
    """A batch of one row that chooses as a request asks."""
    rows: RowSampling = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[None]), one_row(request, [], vocab_size))
    return rows
