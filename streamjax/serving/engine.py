"""The engine: requests in, tokens out, many streams through one batch of fixed shape.

An iteration decodes a token of every row and reads one chunk of the waiting prompts beside it, so that no prompt,
however long, holds up those who are being answered (SARATHI). A request that has read its prompt enters a row as soon
as one is free, and leaves it with its last token.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.typing import DTypeLike

from streamjax.data.text.tokenizers import Tokenizer, require_tokenizer
from streamjax.host_memory import release_freed_memory
from streamjax.kv.cache import Cache
from streamjax.kv.query import Implementation
from streamjax.models.decoder import Decoder
from streamjax.models.files.peft import load_lora
from streamjax.models.layer_stacking import unstack_layers
from streamjax.models.lora.row_adapters import Factors, factors_of, require_only_adapters
from streamjax.serving.admission import require_possible, require_room_for
from streamjax.serving.batch import LEAST_WIDTH
from streamjax.serving.conversations import Conversation, Conversations
from streamjax.serving.drafts.choosing import guessing_by, require_drafter
from streamjax.serving.jobs import Job
from streamjax.serving.loop import EngineLoop
from streamjax.serving.paging.choosing import make_batch
from streamjax.serving.requests import Event, KeptConversation, Overloaded, Request, Stats
from streamjax.serving.row_states import ParkedState
from streamjax.serving.scheduling import POLICIES, ChunkPace
from streamjax.streaming.speculative.drafter import Drafter

log = logging.getLogger(__name__)


class Engine:
    """Serves requests with one model and one cache.

    It works in a thread of its own between `start` and `close`; without one, each call of `step` is an iteration.

    Attributes:
      draft_memory: what guesses take, counted; None where nobody asked.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      cache: a cascade for all layers, or one a layer.
      rows: requests that decode at a time.
      chunk_size: tokens of prompts that are read in an iteration: more read faster, and keep the rows waiting longer.
      step_seconds: that an iteration may take while rows decode, and at most so long they wait for their next tokens:
        chunks are as small as that asks, by what is measured, and `chunk_size` where no row decodes. Where a prompt is
        cut then depends on time, and with it rounding, but not what is computed. None: all have `chunk_size`.
      queue: requests that may wait.
      memory_bytes: what all states together may take; None does not ask.
      prefix_bytes: what states at the beginnings of prompts may take, in the host's memory; 0 keeps none.
      conversation_bytes: the same of idle conversations. Beyond it they stay on disk alone, with a `state_dir`; without
        one a new conversation is refused.
      pool_tokens: for caches that keep every token (`dense`): how many all streams may hold together, in pages of one
        pool. None: as many as `rows` streams of full length; 0: no pool, each row has room for its full length.
      narrow: whether a pass over few rows computes few, the first 1, 4, 16 or 64, where that has a program of its own:
        on CPUs a lone stream is twice as fast so. How many run then decides the last bits of what each computes. Not
        with adapters or a pool.
      fused: whether rows draw and a chunk of a prompt is read in the same programs, so that weights are read once for
        both. The last bits then depend on what is read beside a stream. Not with adapters, a pool or `measure`, nor
        while guesses are read.
      policy: which requests run: "fcfs", in the order in which they came, or "mlfq", short answers before long ones.
      state_dir: where conversations are saved, each after every request and before its last event, as sessions that
        `Session.load` reads too. Those that are there are taken up.
      block: tokens a row that are decoded between two looks at the host, while nobody waits. A cancelled request holds
        its row for so many. None: 1 on CPU, 8 elsewhere.
      measure: whether what reading costs is measured (`costs`), which computes logits of every prompt token.
      adapters: folders of LoRA adapters (PEFT's, or `save_lora`'s) by the names with which requests ask for them. They
        lie in the host's memory, and each row has a copy of its own while it needs one.
      draft: who guesses tokens that are then read several at a time: `sj.NGrams()`, `sj.SmallModel(...)`, or what was
        trained for the model (`trained_drafter`); None: nobody. What requests get is the same. Guesses rest where they
        would make others wait.
      draft_memory: bytes that guesses may take: weights of their own, and a pass over them. As many tokens are guessed
        as fit. None does not ask.
      draft_cost: how long a pass takes that reads guesses, in passes over one token a row: guesses are read where they
        bring more. 1 reads all of them. None: as it is measured meanwhile.
      dtype, implementation: as in `init_state`.

    Raises:
      ValueError: sizes that are none, an unknown policy, a drafter of another vocabulary, more than `memory_bytes`, too
        little `draft_memory`, or a `state_dir` that is none.

    Example:
      >>> engine = Engine(model, tokenizer, sj.kv.preset("streaming_llm"))
      >>> engine.start()
      >>> ticket = engine.submit(Request(prompt=tuple(tokenizer.encode("Once")), max_new_tokens=16))
      >>> text = "".join(event.text for event in ticket.events())
      >>> engine.close()
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        cache: Cache | Sequence[Cache],
        *,
        rows: int = 8,
        chunk_size: int = 64,
        step_seconds: float | None = None,
        queue: int = 1024,
        memory_bytes: int | None = None,
        prefix_bytes: int = 1 << 28,
        conversation_bytes: int = 1 << 30,
        pool_tokens: int | None = None,
        narrow: bool = False,
        fused: bool = False,
        policy: str = "fcfs",
        state_dir: str | Path | None = None,
        block: int | None = None,
        measure: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        draft: Drafter | None = None,
        draft_memory: int | None = None,
        draft_cost: float | None = None,
        dtype: DTypeLike | None = None,
        implementation: Implementation | None = None,
    ):
        for name, value in (("rows", rows), ("chunk_size", chunk_size), ("queue", queue), ("block", block)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if draft_cost is not None and not 1 <= draft_cost < float("inf"):
            raise ValueError(f"draft_cost must be a number of at least 1, got {draft_cost}")
        if step_seconds is not None and not 0 < step_seconds < float("inf"):
            raise ValueError(f"step_seconds must be a number above 0, got {step_seconds}")
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: use one of {', '.join(POLICIES)}")
        require_drafter(draft, model)
        require_tokenizer(tokenizer, model.config.vocab_size, "they do not belong together")
        if block is None:
            block = 1 if jax.default_backend() == "cpu" else 8
        if adapters and model.stack:
            model = unstack_layers(model)
        self._adapters = {name: _factors(model, name, folder) for name, folder in (adapters or {}).items()}
        self._batch = make_batch(
            model, cache, rows, chunk_size, block, dtype, implementation, self._adapters,
            pool_tokens=pool_tokens, prefix_bytes=prefix_bytes, conversation_bytes=conversation_bytes,
            memory_bytes=memory_bytes,
        )  # fmt: skip
        self._batch.narrow = narrow
        self._batch.fused = fused and not measure and self._batch.can_be_fused
        self.model, self.tokenizer = model, tokenizer
        self._conversations = Conversations(model, tokenizer, self._batch.parking, state_dir, conversation_bytes)
        self._changed = threading.Condition()  # guards the inbox, cancellations, and what is counted
        self._guessing, self.draft_memory = guessing_by(draft, self._batch, draft_memory, draft_cost)
        pace = None if step_seconds is None else ChunkPace(step_seconds, LEAST_WIDTH, chunk_size)
        self._loop = EngineLoop(
            self._batch, POLICIES[policy](), prefix_bytes, self._conversations, measure, self._changed, self._guessing,
            pace,
        )  # fmt: skip
        self._queue, self._measure = queue, measure
        self._inbox: collections.deque[Job] = collections.deque()
        self._loading: dict[Job, concurrent.futures.Future[ParkedState | None]] = {}
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- what clients call, from any thread

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Job:
        """Take a request; returns at once. See `RequestEngine.submit`.

        Raises:
          Overloaded: the queue is full.
          ValueError: it can never be served.
        """
        require_possible(request, self.model.config.vocab_size, self._adapters)
        number = None if request.adapter is None else list(self._adapters).index(request.adapter)
        vocab = self.model.config.vocab_size
        shared = min(request.shared, len(request.prompt))
        shared -= shared % self._batch.cut
        job = Job(request, self.tokenizer, self._batch.chunk_size, on_event, self._cancel, vocab, number, shared)
        with self._changed:
            if self._closed:
                raise ValueError("the engine is closed")
            if self._waiting() >= self._queue:
                raise Overloaded(max(self._loop.seconds * self._waiting() / self._batch.rows, 1.0))
            if request.conversation is None:
                require_room_for(request, 0, self._batch.capacity)
            else:
                job.conversation = self._conversations.claim(
                    request.conversation,
                    job,
                    lambda kept: self._require_going_on(request, kept),
                )
            self._inbox.append(job)
            self._changed.notify_all()
        return job

    def _require_going_on(self, request: Request, kept: Conversation) -> None:
        require_room_for(request, kept.tokens_seen, self._batch.capacity)
        if kept.tokens_seen and kept.adapter != request.adapter:
            began = "the model alone" if kept.adapter is None else f"adapter {kept.adapter!r}"
            raise ValueError(f"conversation {kept.name!r} began with {began}, and cannot go on with another")

    def conversations(self) -> Sequence[KeptConversation]:
        """All that are kept, the newest last."""
        return self._conversations.infos()

    def costs(self) -> dict[str, tuple[float, int]]:
        """Of each conversation the nats that its prompts cost, and of how many tokens; with `measure`."""
        return self._conversations.costs()

    def delete_conversation(self, name: str) -> bool:
        """Forget one, in memory and on disk; whether there was one. A request that is under way on it is cancelled."""
        known, job = self._conversations.delete(name)
        if job is not None:
            self._cancel(job)
        return known

    def save(self, name: str) -> None:
        """Save a conversation now.

        Raises:
          ValueError: there is none of this name, a request is under way on it, or the engine has no `state_dir`.
        """
        self._conversations.save(name)

    def stats(self) -> Stats:
        """What the engine does now, and the sums since it began."""
        with self._changed:
            loop, guessing = self._loop, self._guessing
            return Stats(
                rows=self._batch.rows,
                running=sum(job is not None for job in loop.rows),
                waiting=self._waiting(),
                cache_bytes=self._batch.cache_bytes,
                prompt_tokens=loop.read,
                cached_tokens=loop.cached,
                generated_tokens=loop.generated,
                guessed_tokens=0 if guessing is None else guessing.guessed,
                accepted_tokens=0 if guessing is None else guessing.right,
                finished=dict(loop.finished),
            )

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the states that are kept at the beginnings of prompts."""
        return self._loop.prefixes.nbytes

    def warm_up(self) -> None:
        """Compile every program, so that no request waits for that. To be called before `start`."""
        with self._stepping:
            if self._guessing is not None:
                self._guessing.warm_up()
            self._batch.warm_up(self._measure, None if self._guessing is None else self._guessing.nothing())
            release_freed_memory()

    def start(self) -> None:
        """Begin to serve, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Cancel what is under way, save every conversation, end the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._inbox, *self._loop.jobs, *self._loading):
                job.cancelled = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        while self.step():
            pass
        self._conversations.close()

    # -- the loop

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._inbox or self._loop.jobs or self._loading)
                if self._closed:
                    return
            self.step()

    def step(self) -> bool:
        """One iteration; whether any request is under way. Not to be called between `start` and `close`."""
        with self._stepping:
            try:
                self._admit()
                self._loop.iterate(bool(self._inbox or self._loading))
            except Exception as error:
                # Whatever went wrong, the batch may have been donated to it: its requests end, and the engine goes on.
                log.exception("an iteration failed")
                self._loop.fail_all(f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            with self._changed:
                return bool(self._inbox or self._loop.jobs or self._loading)

    def _admit(self) -> None:
        """Take what has come, and end what was cancelled."""
        with self._changed:
            arrived = list(self._inbox)
            self._inbox.clear()
            for job in arrived:
                self._loading[job] = (
                    _nothing() if job.conversation is None else self._conversations.begin(job.conversation)
                )
        if not self._loop.jobs and self._loading:
            concurrent.futures.wait(self._loading.values(), return_when=concurrent.futures.FIRST_COMPLETED, timeout=1)
        for job in [job for job, found in self._loading.items() if found.done() or job.cancelled]:
            self._take(job, self._loading[job])
        for job in [job for job in self._loop.jobs if job.cancelled]:
            self._loop.end(job, "cancelled")

    def _take(self, job: Job, found: concurrent.futures.Future[ParkedState | None]) -> None:
        """What a request goes on from is in memory: it is the loop's from now on."""
        kept = job.conversation
        if kept is not None and kept.tokens_seen and not job.cancelled and found.exception() is None:
            job.parked = found.result()
            job.begin(0, kept.output["tail"])
            job.before = kept.tokens_seen
            self._loop.cached += kept.tokens_seen
        with self._changed:
            del self._loading[job]
            self._loop.add(job)
        if not job.cancelled and (error := found.exception()) is not None:
            self._loop.end(job, "error", " ".join(str(error).split()))

    def _cancel(self, job: Job) -> None:
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def _waiting(self) -> int:
        return len(self._inbox) + len(self._loading) + sum(job.row is None for job in self._loop.jobs)


def _factors(model: Decoder, name: str, folder: str | Path) -> Factors:
    """An adapter's factors, from its folder."""
    adapted = load_lora(model, folder)
    require_only_adapters(model, adapted, name)
    return factors_of(adapted)


def _nothing() -> concurrent.futures.Future[ParkedState | None]:
    found: concurrent.futures.Future[ParkedState | None] = concurrent.futures.Future()
    found.set_result(None)
    return found
