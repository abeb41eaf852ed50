"""What a client asks of an engine, and what it gets: the contract between the engine and the servers in front of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from streamjax.field_checks import Count, Fraction, Interval, NotNegative, Positive, check_fields

FinishReason = Literal["stop", "length", "cancelled", "error"]


@runtime_checkable
class Constraint(Protocol):
    """Which tokens may come next, for output in a given form (a JSON schema, a tool's arguments). One per request."""

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Tokens that may come now; stop tokens are allowed where the form may end."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind a token that was drawn."""
        ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen; unlike `streamjax.Sampler` it is data of a row, and compiles nothing.

    temperature: 0 is greedy. top_k: 0 keeps all. presence_penalty, frequency_penalty: OpenAI's, subtracted from the
    logits of tokens that this request has generated (once; times their count). repetition_penalty: as in `Sampler`,
    over all that the stream has read. seed: of the row's own key; a request's tokens do not depend on its neighbours.
    logit_bias: (token, added to its logit) pairs.
    """

    temperature: NotNegative = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Interval(0, 1, above=True)] = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: Annotated[float, Interval(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Interval(-2, 2)] = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Request:
    """One generation.

    prompt: ids that are read first; may be empty where a conversation goes on. max_new_tokens: at most so many; 0 only
    reads, so that a conversation's turn may come in pieces.
    stop_ids: ids that end it; the stream has read them. stop: strings that end the text; they do not appear in it.
    logprobs: so many alternatives a token are reported; None reports none, 0 the drawn token's alone. constraint: the
    form of the output. conversation: the name of a stream that the server keeps: the request goes on where it stands,
    and it stands behind the request's last token afterwards; None starts anew (a prefix that the engine knows is not
    read again) and keeps nothing. adapter: the name of a LoRA adapter; None is the model as it is. shared: so many of
    the prompt's ids stand by themselves, as a system prompt does: they are read in chunks of their own, so that other
    requests that begin with them go on from there. extra: plain data that is kept, and saved, with the conversation
    from this request's first token on.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    conversation: str | None = None
    adapter: str | None = None
    shared: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A drawn token's log-probability, in nats, under the model's own distribution, and the most likely tokens'."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request: prompt's, those of them that were not read again, and generated ones.

    What a conversation had read before counts as prompt, of which nothing was read again.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of a request's output: text that is certain, the ids it came from; the last one says why it ended."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # with the last event
    error: str | None = None  # one line, where the finish reason is "error"


@runtime_checkable
class Ticket(Protocol):
    """A request under way."""

    def events(self) -> Iterator[Event]:
        """Pieces as they come, the last with a finish reason; waits between them. For one consumer.

        Of a request that was submitted with `on_event` there are none here.
        """
        ...

    def cancel(self) -> None:
        """The client has gone: the request's row is free within a step. No effect on a finished one."""
        ...


@dataclasses.dataclass(frozen=True)
class KeptConversation:
    """A stream that the server keeps, between two requests.

    tokens_seen: read and generated ones. stopped_by: the stop string or the id that ended its newest answer; None where
    that was cut short. extra: that of its newest request. A request that is cancelled before its prompt has been read
    leaves all of it as it was. busy: a request is under way on it; the other fields are those before it then.
    """

    name: str
    tokens_seen: int
    stopped_by: str | int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    busy: bool = False


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine does now, and the sums since it began.

    rows: that it has. running: rows in use. waiting: requests in the queue. cache_bytes: of all rows' states together,
    constant. The sums: prompt tokens that were read, prompt tokens that a known prefix or a conversation spared,
    generated tokens, tokens that were guessed and read beside others, those of them that were right, and requests by
    finish reason.
    """

    rows: int
    running: int
    waiting: int
    cache_bytes: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    finished: Mapping[str, int] = dataclasses.field(default_factory=dict)


@runtime_checkable
class RequestEngine(Protocol):
    """What a server in front asks of an engine; `streamjax.serving.engine.Engine` is one."""

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Ticket:
        """Take a request; returns at once.

        Args:
          request: what is wanted.
          on_event: is called with each event, in order, from the engine's thread, and must not block; the ticket's
            `events` then yields nothing.

        Raises:
          Overloaded: the queue is full.
          ValueError: it can never be served: ids outside of the vocabulary, more tokens than the cache has room for, a
            conversation that another request is under way on, an unknown adapter.
        """
        ...

    def conversations(self) -> Sequence[KeptConversation]:
        """All that are kept, the newest last."""
        ...

    def delete_conversation(self, name: str) -> bool:
        """Forget one, in memory and on disk; whether there was one. A request that is under way on it is cancelled."""
        ...

    def stats(self) -> Stats: ...

    def start(self) -> None: ...

    def close(self) -> None:
        """Cancel what is under way, save every conversation, end the thread."""
        ...


class Overloaded(Exception):
    """The engine's queue is full; `retry_after` seconds say when to come again."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after
