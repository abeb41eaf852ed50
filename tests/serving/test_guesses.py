"""Guesses in the engine: what every request gets is what it gets without them, under every cache, and nobody waits."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, GatedDeltaConfig, ModelConfig
from streamjax.serving import loop
from streamjax.serving.drafts import guessing
from streamjax.serving.drafts.decoding import decode_guessed
from streamjax.serving.drafts.guessing import Guessing
from streamjax.serving.drafts.pass_times import PassTimes
from streamjax.serving.requests import Sampling
from streamjax.serving.row_sampling import no_rows
from tests.serving import engines
from tests.serving.engines import GREEDY, bytes_model, engine, finish, request, served, text, tokens
from tests.serving.test_engine import SAMPLED, Alternating
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import CACHE

DENSE = sj.kv.preset("dense", capacity=128)
PENALISED = Sampling(temperature=0.3, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.1, seed=5)
MIXED = [
    request("ababababab", 30),
    request("some words here, some words here", 25, SAMPLED),
    request("Once upon a time, Once upon a", 20, dataclasses.replace(PENALISED, logit_bias=((97, 1.0),))),
    request("xyz" * 9, 17, dataclasses.replace(SAMPLED, temperature=0.1, seed=3)),
    request("a", 40),
]


class Prompter(sj.NGrams):
    """Knows what comes, and is right about so many tokens in turn: 0, 1, ..., all of them."""

    known = ()

    def ways(self, stream, most):
        said = stream.tolist()
        for whole in self.known:
            if whole[: len(said)] == said and len(said) < len(whole):
                way = np.array(whole[len(said) :][: self.length + 1], np.int32)
                right = 1 + len(said) % (self.length + 1)
                way[right:] = (way[right:] + 1) % 259
                return [np.array([300, 5, 5], np.int32), way, np.array([way[0] + 1, 5, 5], np.int32)]
        return []


def prompter(*known) -> Prompter:
    drafter = Prompter(length=4)
    drafter.known = [[*one.prompt, *said] for one, said in known]
    return drafter


def never_rests(monkeypatch) -> None:
    monkeypatch.setattr(PassTimes, "cost", lambda times, running: 1.0)
    monkeypatch.setattr(PassTimes, "unknown", lambda times, running: False)


@functools.cache
def plain(index: int, cache=CACHE) -> list[int]:
    return tokens(served(engine(cache=cache), MIXED[index])[0])


@pytest.mark.usual("pool")
@pytest.mark.parametrize("cache", [CACHE, DENSE], ids=["rings", "pool"])
def test_tokens_are_those_without_guesses(monkeypatch, cache):
    """Greedy, sampled, filtered, penalised, biased; each row right about another number of tokens."""
    never_rests(monkeypatch)
    known = [(MIXED[i], plain(i, cache)) for i in range(len(MIXED))]
    pool = 80 if cache is DENSE else None  # room for two of the five: they preempt each other
    one = engine(cache=cache, draft=prompter(*known), policy="mlfq", pool_tokens=pool)
    found = served(one, *MIXED)
    assert [tokens(events) for events in found] == [said for _, said in known]
    stats = one.stats()
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
    assert stats.generated_tokens == sum(one.max_new_tokens for one in MIXED)
    assert [events[-1].usage.completion_tokens for events in found] == [one.max_new_tokens for one in MIXED]
    if cache is DENSE:
        assert one._batch.book.free == one._batch.book.pages


@pytest.mark.slow
@settings(max_examples=6)
@given(st.permutations(range(len(MIXED))), st.lists(st.integers(0, 6), min_size=5, max_size=5), st.booleans())
def test_neighbours_preemption_and_a_short_pool_change_nothing(order, pauses, pool):
    with pytest.MonkeyPatch.context() as patch:
        never_rests(patch)
        cache = DENSE if pool else CACHE
        one = engine(cache=cache, draft=sj.NGrams(length=4), policy="mlfq", pool_tokens=80 if pool else None)
        tickets = {}
        for i, pause in zip(order, pauses, strict=True):
            tickets[i] = one.submit(MIXED[i])
            for _ in range(pause):
                one.step()
        finish(one)
        assert {i: tokens(list(ticket.events())) for i, ticket in tickets.items()} == {
            i: plain(i, cache) for i in range(len(MIXED))
        }


@pytest.mark.usual("pool")
@pytest.mark.parametrize("cache", [CACHE, DENSE], ids=["rings", "pool"])
def test_a_conversation_stands_where_it_stood_without_guesses(monkeypatch, cache):
    """Behind a stop string or a stop id nothing is read, and what a next request gets is the same."""
    never_rests(monkeypatch)
    said = plain(0, cache)
    word = bytes(token for token in said[6:8] if token < 256).decode("latin-1")
    stops = [{"stop": (word,)}, {"stop_ids": (said[9],)}] if word.isascii() and word else [{"stop_ids": (said[9],)}]
    for options in stops:
        turns = [dataclasses.replace(MIXED[0], conversation="ann", **options), request([5, 6], 9, conversation="ann")]
        before, after = engine(cache=cache), engine(cache=cache, draft=prompter((MIXED[0], said)))
        for turn in turns:
            (expected,), (found,) = served(before, turn), served(after, turn)
            assert tokens(found) == tokens(expected)
            assert found[-1].usage == expected[-1].usage
            assert text(found) == text(expected)
        assert after.stats().accepted_tokens > 0


def test_log_probabilities_are_those_of_single_steps(monkeypatch):
    never_rests(monkeypatch)
    wanted = dataclasses.replace(MIXED[0], logprobs=3)
    (expected,), (found,) = (served(engine(draft=draft), wanted) for draft in (None, prompter((wanted, plain(0)))))
    expected, found = ([one for event in events for one in event.logprobs] for events in (expected, found))
    assert [one.token for one in found] == [one.token for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_a_form_is_kept_beside_rows_that_guess(monkeypatch):
    never_rests(monkeypatch)
    one = engine(draft=prompter((MIXED[0], plain(0))))
    formed, free = served(one, request("x", 4, SAMPLED, constraint=Alternating(72, 73, 74, 75)), MIXED[0])
    assert text(formed) == "HIJK"
    assert tokens(free) == plain(0)


def test_n_grams_of_a_repeating_text_take_fewer_passes(monkeypatch):
    never_rests(monkeypatch)
    wanted = request("a", 60, dataclasses.replace(GREEDY, logit_bias=((65, 100.0),)))
    one, steps = engine(draft=sj.NGrams(length=4)), 0
    ticket = one.submit(wanted)
    while one.step():
        steps += 1
    assert tokens(list(ticket.events())) == [65] * 60
    assert steps < 24
    assert one.stats().accepted_tokens > 40


@pytest.mark.slow
def test_no_cache_is_copied():
    """The program branches between passes over one token and over several; the caches stay where they are."""
    model, rows = bytes_model(), no_rows(2, 259)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=4096), 2, note_used=True)
    ways, shape = np.zeros((2, 4), np.int32), ",".join(map(str, max(jax.tree.leaves(state), key=np.size).shape))
    lowered = decode_guessed.lower(model, state, rows, np.ones(2, bool), np.zeros((2, 4, 5), np.int32), ways)
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", lowered.compile().as_text())


@pytest.mark.slow
def test_recurrent_states_take_in_what_was_right(monkeypatch):
    never_rests(monkeypatch)
    delta = BlockConfig(GatedDeltaConfig(num_heads=4, num_groups=2, key_dim=6, value_dim=5), DenseConfig(24))
    window = BlockConfig(AttentionConfig(4, 2, 6, window=7), DenseConfig(24))
    model = jax.tree.map(lambda x: 0.3 * x, build(ModelConfig(259, 16, (delta, window), bos_token_id=256)))
    wanted = [request("ababab" * 3, 20), request("some words", 12, SAMPLED)]
    plain, guessing_one = (
        sj.Engine(model, engines.Endless(), CACHE, rows=2, chunk_size=8, prefix_bytes=0, draft=draft)
        for draft in (None, sj.NGrams(length=4))
    )
    expected = [tokens(events) for events in served(plain, *wanted)]
    known = prompter(*zip(wanted, expected, strict=True))
    knowing = sj.Engine(model, engines.Endless(), CACHE, rows=2, chunk_size=8, prefix_bytes=0, draft=known)
    for one in (guessing_one, knowing):
        assert [tokens(events) for events in served(one, *wanted)] == expected
    assert knowing.stats().accepted_tokens > 5


@pytest.mark.quick
def test_passes_cost_what_they_were_measured_to_take():
    times = PassTimes(rows=4, width=8)
    before = times.cost(4)
    assert before == PassTimes(4, 8).cost(1) > 1  # by the platform
    assert times.unknown(4)
    for seconds in (5.0, 0.02, 0.5, 0.02):  # the first one compiled; one of the others was disturbed
        times.took(seconds, 4, several=False)
    assert not times.unknown(4)
    assert times.unknown(3)
    for seconds in (7.0, 0.06):
        times.took(seconds, 4, several=True)
        assert times.cost(4) == before
    times.took(0.06, 3, several=True)
    assert times.cost(4) == times.cost(1) == pytest.approx(3)  # one row alone was never timed
    for seconds in (5.0, 0.01, 0.01, 0.01):
        times.took(seconds, 1, several=False)
    assert times.cost(1) == times.cost(2) == pytest.approx(6)
    assert times.cost(3) == pytest.approx(3)
    for _ in range(9):
        times.took(0.001, 4, several=True)
    assert times.cost(4) == 1
    assert PassTimes(4, 8, fixed=2.5).cost(4) == 2.5


@pytest.mark.parametrize("slow", [False, True])
def test_an_engine_whose_wide_passes_are_slow_rests(monkeypatch, slow):
    """All guesses are right, but a pass that reads them takes 100 times as long."""
    wanted = request("ab", 60)
    expected = tokens(served(engine(cache=CACHE), wanted)[0])
    drafter = Prompter(length=4)
    drafter.known = [[*wanted.prompt, *expected]]
    one = engine(cache=CACHE, draft=drafter)
    decode, clock, wide = one._batch.decode, [0.0], [0]

    def timed(active, count, guesses=None):
        wide[0] += guesses is not None
        clock[0] += count * (0.01 if guesses is None else 1.0 if slow else 0.011)
        return decode(active, count, guesses)

    monkeypatch.setattr(one._batch, "decode", timed)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    assert tokens(served(one, wanted)[0]) == expected
    assert wide[0] <= 6 if slow else wide[0] > 6


@pytest.mark.quick
def test_a_full_batch_rests_where_few_rows_repeat_themselves():
    """Eight rows, a wide pass takes 2.5 times as long: one row's guesses would cost twelve tokens and bring four."""
    some = Guessing(sj.NGrams(length=7), 8, 100, cost=2.5)
    repeats, other = [some.begin([1, 2, 3] * 5, None) for _ in range(8)], some.begin(range(50), None)
    assert some.propose([repeats[0], *[other] * 7], 8) is None
    assert some.propose([repeats[0], *[None] * 7], 1) is not None
    assert some.propose(repeats, 8) is not None


@pytest.mark.quick
@given(st.lists(st.integers(0, 7), min_size=1, max_size=200), st.integers(1, 8), st.floats(1.0, 4.0), st.integers(0, 9))
def test_what_guesses_cost_is_bounded_whatever_is_right(rights, running, cost, most):
    """Time in passes over a token a row, against what the same tokens would have taken without guesses."""
    some = Guessing(sj.NGrams(length=7), 8, 100, cost=cost)
    lines = [some.begin([1, 2, 3] * 5, None) for _ in range(running)]
    time = read = 0.0
    for right in rights:
        guessed = some.propose([*lines, *[None] * (8 - running)], running) is not None
        new = 1 + min(right, most) * guessed
        some.ran(running, several=guessed)
        for line in lines:
            some.note(line, [1] * new, 7 * guessed)
        time += cost if guessed else 1
        read += new
    assert time <= read * (1 + guessing.SHARE) + guessing.START + cost
