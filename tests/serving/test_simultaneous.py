"""Streams that answer while they are read, for a server: what `generate_while_reading` says, by one program for all."""

import jax
import pytest

import streamjax as sj
from streamjax.serving.requests import Overloaded, Request, Sampling
from streamjax.serving.simultaneous import streams as module
from streamjax.serving.simultaneous.streams import SimultaneousStreams
from streamjax.streaming.simultaneous import generate_while_reading
from tests.serving.engines import GREEDY, bytes_model
from tests.streaming.tiny_sessions import Endless

CACHE = sj.kv.preset("dense", capacity=48)
SOURCE, BEFORE, BEGIN = [*b"some words and more of them"], [256, 60], (62, 61)
SAMPLED = Sampling(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=7)


@pytest.fixture(scope="module")
def streams():
    with_two = SimultaneousStreams(bytes_model(), Endless(), CACHE, 2, chunk_size=8)
    with_two.warm_up()
    yield with_two
    with_two.close()


def written(streams, sampling, wait, between, piece, count=9, **options):
    """What a stream writes that is fed in pieces, and how much of the source it had read before each token."""
    stream = streams.open(Request(BEGIN, count, sampling, **options), BEFORE, wait, between)
    source, events, read = list(SOURCE), [], []
    try:
        while not stream.ended:
            while source and not stream.due(False):
                stream.feed(source[:piece])
                del source[:piece]
            assert stream.due(not source)
            events += stream.step()
            read.append(stream._read)
    finally:
        stream.close()
    return events, read


@pytest.mark.parametrize(("sampling", "piece"), [(GREEDY, 1), (SAMPLED, 5)], ids=["greedy", "sampled"])
def test_it_writes_what_the_library_writes(streams, sampling, piece):
    compiled = module._write._cache_size(), module._read._cache_size()
    events, read = written(streams, sampling, 4, 2, piece)
    chosen = sj.Sampler(sampling.repetition_penalty, sampling.temperature, sampling.top_k)
    expected, counts = [], []
    for state, token in generate_while_reading(
        bytes_model(), module.init_groups(bytes_model(), CACHE), [[*BEFORE, *SOURCE]], wait=6, between=2,
        begin=BEGIN, max_new_tokens=9, sampler=chosen, key=jax.random.key(sampling.seed),
    ):  # fmt: skip
        expected.append(token)
        counts.append(int(state.source.seen[0]))
    assert [token for event in events for token in event.tokens] == expected
    assert read == counts == [6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert (events[-1].finish_reason, events[-1].usage.completion_tokens) == ("length", 9)
    assert events[-1].usage.prompt_tokens == 22 + len(BEGIN)
    assert (module._write._cache_size(), module._read._cache_size()) == compiled


def test_ends_and_what_is_refused(streams):
    events, _ = written(streams, GREEDY, 3, 1, 4)
    said = [token for event in events for token in event.tokens]
    ended, _ = written(streams, GREEDY, 3, 1, 4, stop_ids=(said[2],))
    assert ended[-1].finish_reason == "stop"
    assert [token for event in ended for token in event.tokens] == said[: said.index(said[2])]
    open_ones = [streams.open(Request(BEGIN, 3, GREEDY), BEFORE, 1, 1) for _ in range(2)]
    with pytest.raises(Overloaded):
        streams.open(Request(BEGIN, 3, GREEDY), BEFORE, 1, 1)
    with pytest.raises(ValueError, match="the cache holds 48 tokens of a source: 2 came and 47 do not fit"):
        open_ones[0].feed([1] * 47)
    for one in open_ones:
        one.close()
    for request, message in (
        (Request(BEGIN, 48, GREEDY), "the cache holds 48 tokens of an answer"),
        (Request(BEGIN, 0, GREEDY), "max_new_tokens must be at least 1"),
        (Request((), 1, GREEDY), "the prompt is empty"),
        (Request(BEGIN, 1, GREEDY, conversation="ann"), "has no form, and no conversation"),
    ):
        with pytest.raises(ValueError, match=message):
            streams.open(request, BEFORE, 1, 1)
    with pytest.raises(ValueError, match="can be kept by Full, Window and Sink"):
        SimultaneousStreams(bytes_model(), Endless(), sj.kv.preset("h2o"), 1)
