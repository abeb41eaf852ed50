"""An engine without a model: it answers what a script says, from a thread of its own, and keeps what it was asked."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.serving.requests import (
    Event,
    KeptConversation,
    Overloaded,
    Request,
    Stats,
    TokenLogprob,
    Usage,
)


class FakeTicket:
    def __init__(self, request: Request, on_event: Callable[[Event], None]):
        self.request, self.on_event = request, on_event
        self.cancelled = threading.Event()

    def events(self) -> Iterator[Event]:
        return iter(())

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Answers each request with the ids of a text that `answer` gives, a token an event, then with the end's.

    A constraint is obeyed: where it does not allow the next id, the lowest that it allows takes its place.
    """

    def __init__(self, tokenizer: Tokenizer, most_waiting: int = 64, pause: float = 0.0):
        self.tokenizer, self.most_waiting, self.pause = tokenizer, most_waiting, pause
        self.answer: Callable[[Request], str] = lambda request: "hello"
        self.requests: list[Request] = []
        self.tickets: list[FakeTicket] = []
        self.kept: dict[str, KeptConversation] = {}
        self.closed = False
        self.failure: str | None = None
        self.held = threading.Event()  # while it is not set, nothing is answered
        self.held.set()
        self._queue: queue.Queue[FakeTicket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.closed = True
        self.held.set()
        self._queue.put(None)
        self._thread.join()

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> FakeTicket:
        assert on_event is not None
        if request.adapter is not None or len(request.prompt) > 100_000:
            raise ValueError("the cache holds 100000 tokens: use one of more capacity")
        if self._queue.qsize() >= self.most_waiting:
            raise Overloaded(2.5)
        ticket = FakeTicket(request, on_event)
        self.requests.append(request)
        self.tickets.append(ticket)
        self._queue.put(ticket)
        return ticket

    def conversations(self) -> Sequence[KeptConversation]:
        return list(self.kept.values())

    def delete_conversation(self, name: str) -> bool:
        return self.kept.pop(name, None) is not None

    def stats(self) -> Stats:
        return Stats(rows=4, running=1, waiting=self._queue.qsize(), cache_bytes=1 << 20, finished={"stop": 3})

    def _work(self) -> None:
        while (ticket := self._queue.get()) is not None:
            self.held.wait()
            self._answer(ticket)

    def _answer(self, ticket: FakeTicket) -> None:
        request = ticket.request
        if self.failure is not None:
            ticket.on_event(Event("", finish_reason="error", error=self.failure))
            return
        planned = self.tokenizer.encode(self.answer(request))
        drawn: list[int] = []
        reason = "length"
        while len(drawn) < request.max_new_tokens:
            if ticket.cancelled.is_set():
                reason = "cancelled"
                break
            token = planned[len(drawn)] if len(drawn) < len(planned) else 257
            if request.constraint is not None:
                allowed = request.constraint.allowed()
                if not allowed[token]:
                    token = int(allowed.nonzero()[0][0])
                request.constraint.accept(token)
            drawn.append(token)
            if token == 257:
                reason = "stop"
                break
            logprobs = ()
            if request.logprobs is not None:
                top = tuple((token + i, -0.5 - i) for i in range(request.logprobs))
                logprobs = (TokenLogprob(token, -0.5, top),)
            ticket.on_event(Event(self.tokenizer.decode([token]), (token,), logprobs))
            if self.pause:
                time.sleep(self.pause)
        if request.conversation is not None:
            before = self.kept.get(request.conversation, KeptConversation(request.conversation, 0))
            self.kept[request.conversation] = dataclasses.replace(
                before,
                tokens_seen=before.tokens_seen + len(request.prompt) + len(drawn),
                stopped_by=257 if reason == "stop" else None,
                extra=request.extra,
            )
        usage = Usage(len(request.prompt), 3, len(drawn))
        ticket.on_event(Event("", (257,) if reason == "stop" else (), finish_reason=reason, usage=usage))
