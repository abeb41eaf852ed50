"""A request under way: what the engine knows of it, and the ticket that its client holds."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array, Int32

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.serving.batch import Stream
from streamjax.serving.conversations import Conversation
from streamjax.serving.drafts.guessing import Line
from streamjax.serving.requests import Event, FinishReason, Request, TokenLogprob, Usage
from streamjax.serving.row_states import ParkedState
from streamjax.streaming.text_output import TextOutput

log = logging.getLogger(__name__)


class Job:
    """One request. It waits, reads its prompt, decodes in a row, and may be preempted at any time.

    Attributes:
      path: the prompt's ids, as the tree of prefixes has them: what is `shared` of them fills whole chunks. before:
      tokens that its conversation had read.
      read: tokens of the prompt that its stream has read. cached: those of them that were not read for this request.
      state: its stream while it is in no row, on the device; parked: the same in the host's memory; both None before it
      begins and while it has a row. row: which one it has. line: what guesses know of it, where anybody guesses.
      generated: ids, a stop id included. stopped_by: the string or the id that has ended it. failed: why it cannot go
      on, in one line. came: when, of `time.monotonic`.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        chunk_size: int,
        on_event: Callable[[Event], None] | None,
        on_cancel: Callable[[Job], None],
        vocab_size: int = 0,
        adapter_number: int | None = None,
        shared: int = 0,
    ):
        self.request = request
        self.prompt = np.asarray(request.prompt, np.int32)
        # what a prompt begins with was read with an adapter: to others it is another prompt
        path = self.prompt if adapter_number is None else self.prompt + (adapter_number + 1) * vocab_size
        self._shared, self._filling = shared, -shared % chunk_size
        self.path = np.insert(path, shared, np.full(self._filling, -1, np.int32))
        self.read = self.cached = self.before = 0
        self.state: Stream | None = None
        self.parked: ParkedState | None = None
        self.row: int | None = None
        self.line: Line | None = None
        self.generated: list[int] = []
        self.stopped_by: str | int | None = None
        self.failed: str | None = None
        self.conversation: Conversation | None = None
        self.nats: list[Array] = []
        self.cancelled = self.finished = False
        self.output = TextOutput(tokenizer)
        self.came = time.monotonic()
        self._chunk_size = chunk_size
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event, self._on_cancel = on_event or self._events.put, on_cancel

    @property
    def reading_steps(self) -> int:
        """Chunks that are left of its prompt."""
        return -(-(len(self.path) - self.place(self.read)) // self._chunk_size)

    def place(self, read: int) -> int:
        """Where in its path it stands when it has read so many tokens of its prompt."""
        return read if read < self._shared else read + self._filling

    def read_at(self, place: int) -> int:
        """How many tokens of its prompt it has read at a place of its path."""
        return place if place < self._shared + self._filling else place - self._filling

    def until_cut(self, read: int) -> int:
        """Tokens from there on that a chunk may have at most: to the end of what is shared, or a whole chunk."""
        return min(self._chunk_size, self._shared - read) if read < self._shared else self._chunk_size

    @property
    def begun(self) -> bool:
        """Whether it has a stream."""
        return self.row is not None or self.state is not None or self.parked is not None

    @property
    def reads(self) -> bool:
        """Whether its prompt is not over."""
        return not self.begun or self.read < len(self.prompt)

    @property
    def starts_anew(self) -> bool:
        """Whether its stream is one that has read nothing before the prompt."""
        return self.conversation is None or not self.conversation.tokens_seen

    def begin(self, cached: int, tail: Sequence[int]) -> None:
        """Its stream begins; `tail` are the newest ids that it has read before the prompt."""
        self.read = self.cached = cached
        self.output.restart([*tail, *self.prompt.tolist()])

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Take ids that were drawn: the client gets their text. Sets `stopped_by` where they end the text."""
        shown = []
        for token in tokens:
            self.generated.append(token)
            self._accept(token)
            if token in self.request.stop_ids:
                self.stopped_by = token
                break
            shown.append(token)
            self.stopped_by = self.output.push([token], self.request.stop)
            if self.stopped_by is not None:
                break
        if shown:
            self.emit(Event(self.output.take(), tuple(shown), tuple(logprobs[: len(shown)])))

    def last_event(self, reason: FinishReason, error: str | None = None) -> Event:
        """What ends it: the text that was held back, and what it took."""
        if self.conversation is None or isinstance(self.stopped_by, int):
            self.output.finish()
        else:
            self.output.release()
        usage = Usage(self.before + len(self.prompt), self.before + self.cached, len(self.generated))
        return Event(self.output.take(), finish_reason=reason, usage=usage, error=error)

    def told(self) -> Int32[np.ndarray, " T"]:
        """The tokens of its stream, as far as they are in memory."""
        kept = self.conversation
        before = self.prompt[:0] if kept is None or self.starts_anew else kept.newest
        return np.concatenate((before, self.prompt, np.asarray(self.generated, np.int32)))

    def until_end(self, tokens: Sequence[int]) -> int:
        """How many of the tokens that may come next are read at most: none behind a stop string."""
        output = self.output.copy()
        for i, token in enumerate(tokens):
            if output.push([token], self.request.stop) is not None:
                return i + 1
        return len(tokens)

    def _accept(self, token: int) -> None:
        if self.request.constraint is None:
            return
        try:
            self.request.constraint.accept(token)
        except Exception as error:  # of a library that others chose: it is this request's fault alone
            self.failed = f"the form that was asked for failed: {' '.join(str(error).split())}"

    def emit(self, event: Event) -> None:
        """Hand a piece to the client."""
        try:
            self._on_event(event)
        except Exception:  # of the server in front: it is this request's fault alone
            log.exception("an event could not be delivered")
            self.cancelled = True

    def events(self) -> Iterator[Event]:
        """Pieces as they come, the last with a finish reason; waits between them."""
        while True:
            event = self._events.get()
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """The client has gone: the row is free within a step. No effect on a finished request."""
        self._on_cancel(self)
