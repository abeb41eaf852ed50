"""The iterations of an engine: which requests have rows, what of prompts is read, what is drawn and who gets it."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from streamjax.serving.batch import Batch
from streamjax.serving.conversations import Conversation, Conversations
from streamjax.serving.decoding import Drawn
from streamjax.serving.drafts.guessing import KEPT, Guesses, Guessing
from streamjax.serving.jobs import Job
from streamjax.serving.prefix_tree import PrefixTree
from streamjax.serving.requests import Constraint, FinishReason, TokenLogprob
from streamjax.serving.row_sampling import one_row
from streamjax.serving.row_states import ParkedState
from streamjax.serving.scheduling import ChunkPace, Policy

log = logging.getLogger(__name__)


class EngineLoop:
    """The requests that an engine has admitted, and the batch that they run in. For one thread; `lock` guards counts.

    Attributes:
      jobs: the requests that are not over. rows: which of them has each row. read, cached, generated, finished: sums,
      as in `Stats`. seconds: that a request takes, a running mean.
    """

    def __init__(
        self,
        batch: Batch,
        policy: Policy,
        prefix_bytes: int,
        conversations: Conversations,
        measure: bool,
        lock: threading.Condition,
        guessing: Guessing | None = None,
        pace: ChunkPace | None = None,
    ):
        self.batch, self.lock = batch, lock
        self.prefixes = PrefixTree(batch.chunk_size, prefix_bytes, self._work, dropped=batch.drop)
        self.jobs: dict[Job, None] = {}
        self.rows: list[Job | None] = [None] * batch.rows
        self.read = self.cached = self.generated = 0
        self.finished: collections.Counter[str] = collections.Counter()
        self.seconds = 1.0
        self._steps = 1  # tokens that each row draws in the pass that runs
        self._drawing = False  # whether rows wait for what they draw, and must stay where they are
        self._policy, self._conversations, self._measure = policy, conversations, measure
        self._guessing, self._pace = guessing, pace
        self._vocab = batch.model.config.vocab_size
        self._weights = sum(leaf.size for leaf in jax.tree.leaves(batch.model))

    def add(self, job: Job) -> None:
        """A request is under the policy's rule from now on."""
        with self.lock:
            self.jobs[job] = None
        self._policy.add(job)
        if job.starts_anew:
            self.prefixes.add(job.path)

    def iterate(self, others: bool) -> None:
        """Decode all rows once, and read a chunk's worth of prompts; `others`: whether more requests are coming."""
        began, worked = time.perf_counter(), 0.0
        chosen = self._policy.choose(self.batch.rows + 1)  # one reads ahead, for the next row that is free
        self._seat(chosen)
        self._drawing = False
        reader, ready = next((job for job in chosen if job.row is None and job.reads), None), False
        if reader is not None:
            ready = self._prepare(reader, chosen)  # while rows may still give way: what they draw is not under way yet
        running = [job for job in self.rows if job is not None]
        if self._pace is not None:
            self._pace.begin(decoding=bool(running))
        fused = reader if ready and self.batch.fused and not self._measure else None
        before = 0 if fused is None else fused.read
        drawn, size = self._decode(running, len(running) == len(self.jobs) and not others, chosen, fused)
        budget, room, self._drawing = self.batch.chunk_size, True, drawn is not None
        if fused is not None and size:
            worked += self._work(before, before + size)
            budget -= self.batch.width(size)
        for job in chosen:
            while room and budget > 0 and job.row is None and job.reads and not job.finished:
                size = self._chunk_of(job)
                if not size:
                    budget = 0  # no time is left for more
                elif room := self._prepare(job, chosen):  # those behind it do not take what it waits for
                    worked += self._work(job.read, job.read + size)
                    budget -= self._read_chunk(job, size)
        self._drawing = False
        if drawn is not None:
            self._hand_out(running, drawn, None if worked else began)
            if self._pace is not None:
                self._pace.ran(time.perf_counter() - began, worked)
        for job in chosen:
            if job.request.max_new_tokens == 0 and job.row is None and not job.reads and not job.finished:
                self.end(job, "length")

    def _seat(self, chosen: Sequence[Job]) -> None:
        """Give rows to requests that have read their prompts; those that are not chosen make room for the chosen."""
        order, chosen = chosen, chosen[: self.batch.rows]
        for job in chosen:
            if job.row is not None or job.reads or not job.request.max_new_tokens or not self._resume(job, order):
                continue
            if None not in self.rows:
                out = next(other for other in self.rows if other not in chosen)
                assert out is not None
                self._set_aside(out)
            row = self.rows.index(None)
            self.batch.decoding.set(row, job.request.adapter)
            self.batch.enter(row, job.state, one_row(job.request, job.generated, self._vocab))
            job.state = None
            self.rows[row], job.row = job, row

    def _set_aside(self, job: Job) -> None:
        """Take a request's stream off the device, to the host's memory; its row is free."""
        if job.row is None:
            assert job.state is not None
            stream, job.state = job.state, None
        else:
            stream = self.batch.leave(job.row)
            self.rows[job.row], job.row = None, None
        job.parked = self.batch.park(stream)

    def _resume(self, job: Job, chosen: Sequence[Job]) -> bool:
        """See to it that a request's stream is on the device; whether there is room for it."""
        if job.parked is not None:
            parked = job.parked
            job.state = self._with_room(job, chosen, lambda: self.batch.resume(parked))
            if job.state is None:
                return False
            job.parked = None
        return True

    def _with_room(self, job: Job, chosen: Sequence[Job], attempt: Callable[[], Any]) -> Any:
        """What an attempt gives; where there is no room for it, beginnings of prompts and then requests that are less
        urgent give up theirs, until there is or until nothing is left that may be taken."""
        while (found := attempt()) is None:
            if self.prefixes.drop_least(self.batch.gives_room):
                continue
            last = max(
                (one for one in self.jobs if one.state is not None or (one.row is not None and not self._drawing)),
                key=lambda one: self._rank(one, chosen),
                default=job,
            )
            if self._rank(last, chosen) <= self._rank(job, chosen):
                return None
            self._set_aside(last)
        return found

    def _rank(self, job: Job, chosen: Sequence[Job]) -> tuple[int, float]:
        """Requests with a higher one give way: those that the policy has not chosen, the newest first."""
        return (chosen.index(job) if job in chosen else len(chosen)), job.came

    def _prepare(self, job: Job, chosen: Sequence[Job]) -> bool:
        """A stream to read the next chunk of a prompt with, and room for that: whether there is."""
        if not self._resume(job, chosen):
            return False
        if job.state is None:
            depth, beginning = self.prefixes.match(job.path)
            job.state = self.batch.fresh() if beginning is None else self.batch.fork(beginning)
            job.begin(job.read_at(depth), ())
            self.cached += job.read
        stream, more = job.state, len(job.prompt[job.read : job.read + self.batch.chunk_size])
        return self._with_room(job, chosen, lambda: self.batch.reserve(stream, more) or None) is not None

    def _chunk_of(self, job: Job) -> int:
        """How many tokens of a prompt to read now; chunks end where beginnings of prompts are kept."""
        size, start = self.batch.chunk_size, job.read if job.state is not None else 0
        if self._pace is None:
            return job.until_cut(start)
        fitting = self._pace.tokens(lambda count: self._work(start, start + count))
        return min(fitting, size - job.place(start) % size, job.until_cut(start))

    def _read_chunk(self, job: Job, size: int) -> int:
        """Read the next chunk of a prompt; how much of the iteration's budget that took."""
        tokens = job.prompt[job.read : job.read + size]
        if not len(tokens):
            return 0
        assert job.state is not None
        self.batch.reading.set(0, job.request.adapter)
        job.state, nats = self.batch.read(job.state, tokens, self._measure)
        if nats is not None:
            job.nats.append(nats)
        self._was_read(job, len(tokens))
        return self.batch.width(len(tokens))

    def _was_read(self, job: Job, count: int) -> None:
        """So many tokens of a prompt more are in its stream."""
        job.read += count
        self.read += count
        self._policy.ran(job)
        if job.starts_anew and self.prefixes.wants(job.path, place := job.place(job.read)):
            self.prefixes.keep(job.path, place, self.batch.keep(job.state))

    def _decode(
        self, running: Sequence[Job], alone: bool, chosen: Sequence[Job], reader: Job | None
    ) -> tuple[Drawn | None, int]:
        """Let rows draw; several tokens where nobody waits and no text, form or stop string has to be looked at.

        A chunk of a `reader`'s prompt is read in the same programs where they draw one token and guess nothing. Returns
        what was drawn, if anything was, and how many tokens were read.
        """
        looked_at = any(job.request.stop or job.request.constraint is not None for job in running)
        guesses = self._guesses(running)
        count = self._steps = self.batch.block if alone and not looked_at and guesses is None else 1
        for job in sorted(running, key=lambda job: self._rank(job, chosen)):
            if job.row is not None and not self._room_in_row(job, count, chosen):
                self._set_aside(job)
        for job in running:
            if job.row is not None and job.request.constraint is not None:
                self._constrain(job, job.request.constraint)
        active = np.array([job is not None for job in self.rows])
        if not active.any():
            return None, 0
        if guesses is not None:
            self._fit_guesses(guesses)
        elif reader is not None and not reader.finished and (size := self._chunk_of(reader)):
            tokens = reader.prompt[reader.read : reader.read + size]
            drawn, reader.state = self.batch.decode_and_read(active, reader.state, tokens)
            self._was_read(reader, len(tokens))
            return drawn, len(tokens)
        return self.batch.decode(active, count, guesses), 0

    def _guesses(self, running: Sequence[Job]) -> Guesses | None:
        """How rows may go on, where it is worth a wider pass; rows that are held to a form guess nothing."""
        if self._guessing is None:
            return None
        for job in running:
            if job.line is None:
                exact = job.request.stop and job.conversation is not None  # others' streams end with their texts
                job.line = self._guessing.begin(job.told(), job.until_end if exact else None)
        free = [None if job is None or job.request.constraint is not None else job.line for job in self.rows]
        return self._guessing.propose(free, len(running))

    def _fit_guesses(self, guesses: Guesses) -> None:
        """Leave out guesses for which there is no room without that of others."""
        for job, counts in zip(self.rows, guesses.lengths, strict=True):
            if job is None or job.row is None:
                continue
            left = job.request.max_new_tokens - len(job.generated)
            while (most := min(int(counts.max()), left)) > 1 and not self.batch.reserve(job.row, most):
                np.minimum(counts, most - 1, out=counts)

    def _room_in_row(self, job: Job, count: int, chosen: Sequence[Job]) -> bool:
        """Whether a row has room for the tokens that it may draw now."""
        row, more = job.row, min(count, job.request.max_new_tokens - len(job.generated))
        assert row is not None
        return self._with_room(job, chosen, lambda: self.batch.reserve(row, more) or None) is not None

    def _constrain(self, job: Job, constraint: Constraint) -> None:
        """Let a row draw only what its form allows."""
        assert job.row is not None
        try:
            allowed = np.asarray(constraint.allowed(), bool)
        except Exception as error:  # of a library that others chose: it is this request's fault alone
            self.end(job, "error", f"the form that was asked for failed: {' '.join(str(error).split())}")
            return
        if not allowed.any():
            self.end(job, "error", "no token may come next: the form that was asked for cannot be completed")
            return
        bias = np.asarray(one_row(job.request, [], self._vocab).bias)
        self.batch.set_bias(job.row, np.where(allowed, bias, -np.inf).astype(np.float32))

    def _hand_out(self, running: Sequence[Job], drawn: Drawn, began: float | None) -> None:
        """Give what was drawn to the requests, and end those that are over; `began`: where nothing else was done."""
        found = jax.device_get(drawn)
        if self._guessing is not None:
            seconds = None if began is None else (time.perf_counter() - began) / self._steps
            self._guessing.ran(len(running), bool(found.wide), seconds)
        for job in running:
            row = job.row
            if row is None or job.finished:
                continue
            tokens = [int(token) for token in found.token[row] if token >= 0]
            self.batch.grew(row, len(tokens))
            before = len(job.generated)
            self._policy.ran(job)
            if self._guessing is not None and job.line is not None:
                self._guessing.note(job.line, tokens, int(found.guessed[row]))
            job.push(
                tokens, [] if job.request.logprobs is None else logprobs_of(found, row, tokens, job.request.logprobs)
            )
            self.generated += len(job.generated) - before
            if job.failed is not None:
                self.end(job, "error", job.failed)
            elif job.stopped_by is not None:
                self.end(job, "stop")
            elif found.bad[row]:
                self.end(job, "error", "the model computed values that are not finite (NaN or infinity)")
            elif len(job.generated) >= job.request.max_new_tokens:
                self.end(job, "length")

    def end(self, job: Job, reason: FinishReason, error: str | None = None) -> None:
        """A request is over; a conversation stands behind its last token, or where it stood if nothing came of it."""
        row, kept = job.row, job.conversation
        over = job.begun and not job.reads
        parked = job.parked
        if kept is not None and over and reason != "error":
            stream = job.state if row is None else self.batch.leave(row)
            parked = parked if stream is None else self.batch.park(stream)
        elif row is not None:
            self.batch.clear(row)
        elif job.state is not None:
            self.batch.drop(job.state)
        with self.lock:
            if row is not None:
                self.rows[row] = None
            self.jobs.pop(job, None)
            job.finished, job.row = True, None
            self.finished[reason] += 1
            self.seconds += 0.1 * (time.monotonic() - job.came - self.seconds)
        self._policy.remove(job)
        if self._guessing is not None:
            self._guessing.learn(job.generated)
        last = job.last_event(reason, error)
        if kept is None:
            job.emit(last)
        elif not over or reason == "error" or parked is None:
            self._conversations.release(kept)
            job.emit(last)
        else:
            self._conversations.finish(kept, lambda: job.emit(last), **self._changes(job, kept, parked))
        job.state = job.parked = None

    def _changes(self, job: Job, kept: Conversation, parked: ParkedState) -> dict[str, object]:
        """What a request has made of its conversation."""
        nats = [float(np.asarray(x)[0].sum()) for x in job.nats]
        tokens = len(job.prompt) - job.cached if nats else 0
        return {
            "state": parked,
            "tokens_seen": kept.tokens_seen + len(job.prompt) + len(job.generated),
            "stopped_by": job.stopped_by,
            "extra": dict(job.request.extra),
            "output": job.output.to_json_dict(),
            "sampling": job.request.sampling,
            "drawn": len(job.generated),
            "adapter": job.request.adapter,
            "newest": kept.newest if self._guessing is None else job.told()[-KEPT:],
            "nats": (kept.nats[0] + sum(nats), kept.nats[1] + tokens),
        }

    def fail_all(self, error: str) -> None:
        for job in list(self.jobs):
            self.end(job, "error", error)
        self.rows = [None] * self.batch.rows
        self.prefixes.clear()  # its states may be in what is reset
        self.batch.reset()

    def _work(self, start: int, stop: int) -> float:
        """What reading tokens [start, stop) of a stream costs, in multiplications."""
        slots = [cache.slots for cache in self.batch.caches]
        seen = sum(min((start + stop) / 2, n) for n in slots)
        return (stop - start) * (self._weights + 2 * seen * self.batch.model.config.d_model)


def logprobs_of(drawn: Drawn, row: int, tokens: Sequence[int], most: int) -> list[TokenLogprob]:
    """Log-probabilities of a row's tokens, and of `most` alternatives each."""
    return [
        TokenLogprob(
            token,
            float(drawn.logprob[row, i]),
            tuple(
                (int(drawn.top_token[row, i, j]), float(drawn.top_logprob[row, i, j]))
                for j in range(min(most, drawn.top_token.shape[2]))
            ),
        )
        for i, token in enumerate(tokens)
    ]
