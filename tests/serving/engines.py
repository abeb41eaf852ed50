"""Engines over a tiny model of bytes, driven step by step, and what their requests should say."""

import functools

import jax

import streamjax as sj
from streamjax.serving.engine import Engine
from streamjax.serving.requests import Event, Request, Sampling
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, CACHE, Endless

GREEDY = Sampling(temperature=0)


@functools.cache
def bytes_model() -> sj.Decoder:
    """Shared by all tests: its programs are compiled once."""
    return build(BYTES)


def engine(**options) -> Engine:
    """Three rows, chunks of 8 tokens; everything else as a test wants it."""
    given = {"rows": 3, "chunk_size": 8, "prefix_bytes": 0, **options}
    return Engine(bytes_model(), Endless(), given.pop("cache", CACHE), **given)


def request(prompt: str | list[int], count: int = 6, sampling: Sampling = GREEDY, **options) -> Request:
    ids = [256, *prompt.encode()] if isinstance(prompt, str) else prompt
    return Request(tuple(ids), count, sampling, **options)


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def served(engine: Engine, *requests: Request) -> list[list[Event]]:
    """All requests at once; the events of each."""
    tickets = [engine.submit(one) for one in requests]
    finish(engine)
    return [list(ticket.events()) for ticket in tickets]


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def alone(request: Request, cache: sj.kv.Cascade = CACHE) -> list[int]:
    """The same by the library's function, one stream by itself."""
    chosen = request.sampling
    sampler = sj.Sampler(chosen.repetition_penalty, chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
    state = sj.init_state(bytes_model(), cache, note_used=True)
    options = {"sampler": sampler, "key": jax.random.key(chosen.seed), "chunk_size": 8}
    prompt = list(request.prompt)
    while len(prompt) > 8:  # one by one: several chunks at once are a program for each number of them
        state, prompt = sj.read(bytes_model(), state, [prompt[:8]], 8), prompt[8:]
    count = request.max_new_tokens
    return sj.generate(bytes_model(), state, [prompt], max_new_tokens=count, **options)[1][0].tolist()
