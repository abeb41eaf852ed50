"""A small model that guesses in the engine: requests get what they get without it, and nothing compiles for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.serving.drafts.small_models import SmallModelGuessing
from streamjax.streaming.speculative.history import History
from tests.serving.engines import bytes_model, engine, finish, request, served, tokens
from tests.serving.test_engine import SAMPLED, Alternating
from tests.serving.test_guesses import DENSE, MIXED, plain
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, CACHE

OTHER = BYTES.replace(num_layers=1)


def itself(cache=DENSE, **options) -> sj.SmallModel:
    """The engine's own model, which is always right about a greedy row."""
    return sj.SmallModel(model=bytes_model(), cache=cache, length=3, context=64, chunk_size=16, **options)


@pytest.mark.parametrize(
    ("draft", "cache"),
    [
        pytest.param(lambda: itself(drafter=sj.NGrams(length=2)), DENSE, id="itself, staged, pool"),
        pytest.param(lambda: itself(CACHE), CACHE, id="itself, rings", marks=pytest.mark.slow),
        pytest.param(
            lambda: sj.SmallModel(model=build(OTHER), cache=CACHE, length=3, context=8, chunk_size=8),
            CACHE,
            id="another, rings",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tokens_are_those_without_guesses(draft, cache):
    """Greedy, sampled, penalised, held to a form; rows join, are set aside and go.

    It takes long, because the small model has programs of its own: for each width in which it catches up, and for
    passes of its own drafter's guesses.
    """
    pool = 80 if cache is DENSE else None  # room for two of the five: they preempt each other
    one = engine(cache=cache, draft=draft(), draft_cost=1, policy="mlfq", pool_tokens=pool)
    found = served(one, *MIXED)
    assert [tokens(events) for events in found] == [plain(i, cache) for i in range(len(MIXED))]
    stats = one.stats()
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
    tickets = {}
    for i, pause in zip((4, 1, 0), (1, 2, 4), strict=True):
        tickets[i] = one.submit(MIXED[i])
        for _ in range(pause):
            one.step()
    tickets.pop(1).cancel()
    formed = one.submit(request("x", 4, SAMPLED, constraint=Alternating(72, 73, 74, 75)))
    finish(one)
    assert {i: tokens(list(ticket.events())) for i, ticket in tickets.items()} == {i: plain(i, cache) for i in tickets}
    assert len(list(formed.events())) > 0


def test_one_that_is_always_right_reads_all_its_guesses():
    """What it says counts from the token that the row draws next: a pass reads 4 tokens, and none of them is wrong."""
    one = engine(cache=DENSE, draft=itself(), draft_cost=1)
    (events,) = served(one, dataclasses.replace(MIXED[0], max_new_tokens=24))
    assert tokens(events) == plain(0, DENSE)[:24]
    stats = one.stats()
    assert stats.accepted_tokens == stats.guessed_tokens == 18


@pytest.mark.slow
def test_nothing_is_compiled_while_it_serves():
    one = engine(draft=itself(CACHE, drafter=sj.NGrams(length=2)), draft_cost=1)
    one.warm_up()
    compiled = []

    def note(name: str, *_: object, **__: object) -> None:
        compiled.extend([name] if "backend_compile" in name else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        served(one, *MIXED, request([256], 5), request("x" * 64, 9))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled
    assert one.stats().guessed_tokens > 0


def test_a_row_that_is_another_stream_is_read_anew_and_its_neighbours_go_on():
    """Guesses of three rows, one of which becomes another stream twice, are those of drafters for one row.

    Programs for three rows and for one are compiled, which takes long.
    """
    rng = np.random.default_rng(0)
    streams = [History(rng.integers(0, 256, n)) for n in (9, 3, 14)]
    many = SmallModelGuessing(itself(CACHE), bytes_model(), 3, 259, 1)

    def guessed(some: SmallModelGuessing, lines: list) -> np.ndarray:
        return some.propose(lines, len(lines)).tokens[:, 0]

    lines = [many.begin(stream.tokens, None) for stream in streams]
    for turn in range(5):
        expected = []
        for line in lines:
            one = SmallModelGuessing(itself(CACHE), bytes_model(), 1, 259, 1)
            expected.extend(guessed(one, [one.begin(line.history.tokens, None)]))
        np.testing.assert_array_equal(guessed(many, lines), expected)
        for line in lines:
            line.history.extend(rng.integers(0, 256, 2))
        if turn in (1, 2):
            lines[1] = many.begin(rng.integers(0, 256, 6 + turn), None)


def test_a_model_that_fails_guesses_no_more_and_stops_nobody(monkeypatch, caplog):
    broken = build(OTHER, seed=1)
    broken.embedding[...] = broken.embedding[...] * jnp.nan
    draft = sj.SmallModel(model=broken, cache=CACHE, length=3, context=8, chunk_size=8)
    one = engine(cache=DENSE, draft=draft, draft_cost=1)
    (events,) = served(one, MIXED[0])
    assert tokens(events) == plain(0, DENSE)
    assert one.stats().guessed_tokens == 0
    assert caplog.text.count("guesses no more") == 1


def test_another_vocabulary_is_refused():
    small = sj.SmallModel(model=build(OTHER.replace(vocab_size=300)), cache=CACHE)
    with pytest.raises(ValueError, match=r"300 ids .* 259"):
        engine(draft=small)
