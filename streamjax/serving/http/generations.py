"""Between the engine's thread and the event loop: events of many requests, in batches and bounded buffers."""

from __future__ import annotations

import asyncio
import collections
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from streamjax.serving.http.errors import ApiError, overloaded
from streamjax.serving.requests import Event, Overloaded, Request, RequestEngine, Ticket

_MOST_PENDING = 4096  # events that a client may be behind, before its request is cancelled


class Generations:
    """Submits requests, and brings their events into the event loop.

    Whatever the number of requests, the engine's thread wakes the loop once for all events that came since it last ran.

    Args:
      engine: takes the requests.
    """

    def __init__(self, engine: RequestEngine):
        self._engine = engine
        self._inbox: collections.deque[tuple[Generation, int, Event]] = collections.deque()
        self._lock = threading.Lock()
        self._awake = False

    def submit(
        self,
        requests: Sequence[Request],
        most_pending: int | None = _MOST_PENDING,
        done: Callable[[], None] | None = None,
    ) -> Generation:
        """Submit requests that are answered together, or none of them.

        Args:
          requests: a choice each.
          most_pending: events that may wait for a client that does not read; None for one that gets all at the end.
          done: is called in the event loop when the last of them has ended, also where none could begin.

        Raises:
          ApiError: 429, the engine's queue is full; 400, it will never serve one of them.
        """
        loop = asyncio.get_running_loop()
        generation = Generation(len(requests), most_pending, done)
        try:
            for index, request in enumerate(requests):
                take = functools.partial(self._take, loop, generation, index)
                generation.tickets.append(self._engine.submit(request, take))
        except (Overloaded, ValueError) as error:
            generation.cancel()
            generation.finish()
            if isinstance(error, Overloaded):
                raise overloaded(error) from error
            raise ApiError(400, str(error), code="invalid_request") from error
        return generation

    def _take(self, loop: asyncio.AbstractEventLoop, generation: Generation, index: int, event: Event) -> None:
        """In the engine's thread."""
        self._inbox.append((generation, index, event))
        with self._lock:
            if self._awake:
                return
            self._awake = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has ended: nobody waits for these any more
            self._inbox.clear()

    def _deliver(self) -> None:
        with self._lock:
            self._awake = False
        while self._inbox:
            generation, index, event = self._inbox.popleft()
            generation.push(index, event)


class Generation:
    """The events of requests that are answered together, for one consumer in the event loop.

    Args:
      count: of requests.
      most_pending: events that may wait; what goes beyond is cancelled.
      done: called once, when all have ended.
    """

    def __init__(self, count: int, most_pending: int | None, done: Callable[[], None] | None):
        self.tickets: list[Ticket] = []
        self._left = count
        self._most_pending, self._done = most_pending, done
        self._pending: collections.deque[tuple[int, Event]] = collections.deque()
        self._news = asyncio.Event()
        self.overrun = False  # the client did not read, and has lost events

    def push(self, index: int, event: Event) -> None:
        """Take an event; in the event loop."""
        if event.finish_reason is not None:
            self._left -= 1
            if not self._left:
                self.finish()
        if self._most_pending is not None and len(self._pending) >= self._most_pending and not self.overrun:
            self.overrun = True
            self._pending.clear()
            self.cancel()
        if not self.overrun:
            self._pending.append((index, event))
        self._news.set()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the request, event) pairs as they come, until all have ended or the client is too far behind."""
        while True:
            while self._pending:
                yield self._pending.popleft()
            if not self._left or self.overrun:
                return
            self._news.clear()
            await self._news.wait()

    def cancel(self) -> None:
        """Nobody wants the rest."""
        for ticket in self.tickets:
            ticket.cancel()

    def finish(self) -> None:
        """Call `done`, once."""
        done, self._done = self._done, None
        if done is not None:
            done()
