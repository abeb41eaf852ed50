"""What all endpoints share: the model as clients know it, its engine, and how much at once is let in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation.cache_sizes import CacheSizes
from streamjax.serving.http.errors import ApiError, overloaded
from streamjax.serving.http.generations import Generations
from streamjax.serving.http.monitoring import Metrics
from streamjax.serving.http.reading.constraints import Grammars
from streamjax.serving.http.reading.shared_beginning import SharedBeginnings
from streamjax.serving.requests import Overloaded, RequestEngine
from streamjax.serving.simultaneous.streams import SimultaneousStreams

_Result = TypeVar("_Result")
_PREPARING_THREADS = 2


class Service:
    """A model behind the API.

    Args:
      engine: answers; not started.
      name: of the model, as clients say it.
      tokenizer: its own.
      vocab_size: of the model.
      stop_ids: that end an answer.
      adapters: of the engine, which clients name like models.
      trained_length: tokens that the model was trained on at once.
      cache_words: the cache, in words.
      cache_sizes: what a stream holds; None where nobody asks.
      template_values: for the chat template.
      default_tokens: of an answer, where a request does not say.
      most_requests: that are in the server at once; more are told to come again.
      simultaneous: streams that answer while they are read; None: there are none.
    """

    def __init__(
        self,
        engine: RequestEngine,
        name: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        *,
        adapters: Sequence[str] = (),
        trained_length: int = 0,
        cache_words: str = "",
        cache_sizes: CacheSizes | None = None,
        template_values: dict[str, Any] | None = None,
        default_tokens: int = 512,
        most_requests: int = 1024,
        simultaneous: SimultaneousStreams | None = None,
    ):
        if name in adapters:
            raise ValueError(f"adapter {name!r} is called as the model is; give one of them another name")
        self.adapters = tuple(adapters)
        self.engine, self.name, self.tokenizer = engine, name, tokenizer
        self.vocab_size, self.stop_ids, self.trained_length = vocab_size, stop_ids, trained_length
        self.cache_words, self.cache_sizes = cache_words, cache_sizes
        self.template_values = dict(template_values or {})
        self.default_tokens, self.simultaneous = default_tokens, simultaneous
        self.created = int(time.time())
        self.generations = Generations(engine)
        self.grammars = Grammars(tokenizer, vocab_size, stop_ids)
        self.beginnings = SharedBeginnings(tokenizer)
        self.metrics = Metrics(engine)
        self.empty_conversations: dict[str, None] = {}  # created, and nothing said in them yet
        self.held: set[str] = set()  # conversations with a request under way
        self._most_requests, self._requests = most_requests, 0
        self._threads = concurrent.futures.ThreadPoolExecutor(_PREPARING_THREADS, "prepare")

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Room for a request, until the block ends.

        Raises:
          ApiError: 429, there is none.
        """
        if self._requests >= self._most_requests:
            raise overloaded(Overloaded(1))
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def prepare(self, work: Callable[..., _Result], *args: Any) -> _Result:
        """Run what takes milliseconds (templates, tokenizers, grammars) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args))

    @property
    def models(self) -> tuple[str, ...]:
        """What clients may name: the model, and the model with an adapter."""
        return (self.name, *self.adapters)

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a request names, None for the model as it is; 404 where neither is here."""
        if name not in self.models:
            here = "' and '".join(self.models)
            verb = "are" if self.adapters else "is"
            raise ApiError(
                404, f"The model '{name[:128]}' does not exist: '{here}' {verb} here.", "model", "model_not_found"
            )
        return None if name == self.name else name

    @contextlib.contextmanager
    def plain_errors(self) -> Iterator[None]:
        """A ValueError of the library about a client's text is the client's."""
        try:
            yield
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

    def close(self) -> None:
        """Cancel what is under way, and save every conversation."""
        self._threads.shutdown(cancel_futures=True)
        if self.simultaneous is not None:
            self.simultaneous.close()
        self.engine.close()
