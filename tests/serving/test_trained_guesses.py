"""Trained heads in the engine: what every request gets is what it gets without them, and nothing compiles for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, GatedDeltaConfig, ModelConfig
from streamjax.serving.drafts.grown import decode_grown
from streamjax.streaming.step import advance
from tests.serving import engines
from tests.serving.engines import GREEDY, bytes_model, engine, finish, request, served, text, tokens
from tests.serving.test_engine import SAMPLED, Alternating
from tests.serving.test_guesses import DENSE, MIXED, never_rests, plain
from tests.serving.trained_heads import knowing_heads, prompts_of
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import CACHE


@functools.cache
def hydra(cache):
    return knowing_heads(bytes_model(), cache, *([*one.prompt, *plain(i, cache)] for i, one in enumerate(MIXED)))


@pytest.mark.parametrize(
    "cache", [pytest.param(CACHE, marks=pytest.mark.slow, id="rings"), pytest.param(DENSE, id="pool")]
)
def test_tokens_are_those_without_heads(monkeypatch, cache):
    """Greedy, sampled, penalised, held to a form; rows join, are set aside and go, and are right about other depths."""
    never_rests(monkeypatch)
    pool = 80 if cache is DENSE else None  # room for two of the five: they preempt each other
    one = engine(cache=cache, draft=hydra(cache), policy="mlfq", pool_tokens=pool)
    found, compiled = served(one, *MIXED), decode_grown._cache_size()
    assert [tokens(events) for events in found] == [plain(i, cache) for i in range(len(MIXED))]
    stats = one.stats()
    assert 40 < stats.accepted_tokens < stats.guessed_tokens
    assert stats.generated_tokens == sum(one.max_new_tokens for one in MIXED)
    tickets = {}
    for i, pause in zip((4, 1, 0), (1, 2, 4), strict=True):
        tickets[i] = one.submit(MIXED[i])
        for _ in range(pause):
            one.step()
    tickets.pop(1).cancel()
    formed = one.submit(request("x", 4, SAMPLED, constraint=Alternating(72, 73, 74, 75)))
    finish(one)
    assert {i: tokens(list(ticket.events())) for i, ticket in tickets.items()} == {i: plain(i, cache) for i in tickets}
    assert text(list(formed.events())) == "HIJK"
    assert decode_grown._cache_size() == compiled
    if cache is DENSE:
        assert one._batch.book.free == one._batch.book.pages


def test_behind_a_stop_string_no_conversation_reads(monkeypatch):
    never_rests(monkeypatch)
    word = next(chr(token) for token in plain(0, DENSE)[6:] if token < 128)
    asked = dataclasses.replace(MIXED[0], stop=(word,))
    turns = [dataclasses.replace(asked, conversation="ann"), request([5, 6], 9, conversation="ann"), asked]
    before, after = engine(cache=DENSE), engine(cache=DENSE, draft=hydra(DENSE))
    for turn in turns:
        (expected,), (found,) = served(before, turn), served(after, turn)
        assert (tokens(found), text(found)) == (tokens(expected), text(expected))
        assert found[-1].usage == expected[-1].usage
    assert after.stats().accepted_tokens > 0


@jax.jit
def hidden_behind(model, stream, count):
    """Hidden states of a stream's last two tokens, read at once."""
    hidden = advance(model, sj.init_state(model, CACHE), stream, count)[1]
    return jax.lax.dynamic_slice_in_dim(hidden[0], count[0] - 2, 2)


@pytest.mark.slow
def test_prompt_tokens_stand_behind_each_rows_newest_token(monkeypatch):
    """Passes without guesses between, and rows that come later: what is known is of the row's own newest token."""
    never_rests(monkeypatch)
    draft = prompts_of(16, 208)
    one, wide, seen = engine(draft=draft, policy="mlfq"), [], 0
    propose = one._guessing.propose
    monkeypatch.setattr(
        one._guessing, "propose", lambda *args: propose(*args) if wide.append(0) or len(wide) % 4 else None
    )
    again = request("a", 40, dataclasses.replace(GREEDY, logit_bias=((87, 100.0),)))
    tickets = [one.submit(wanted) for wanted in (again, *MIXED)]
    while one.step():
        grown = one._batch.grown
        ahead = np.asarray(grown.ahead)
        for row, job in enumerate(one._loop.rows):
            if job is None or not job.generated or len(wide) % 3:
                continue
            assert grown._ready[row] == bool(len(wide) % 4)
            if grown._ready[row]:
                stream = np.zeros((1, 96), np.int32)
                told = [*job.told().tolist(), 16, 208]
                stream[0, : len(told)] = told
                expected = hidden_behind(bytes_model(), jnp.asarray(stream), jnp.array([len(told)], jnp.int32))
                np.testing.assert_allclose(ahead[row], expected, atol=2e-4)
                seen += 1
    assert seen > 5
    first, *others = (tokens(list(ticket.events())) for ticket in tickets)
    assert first == [87] * 40
    assert others == [plain(i) for i in range(len(MIXED))]
    assert one.stats().accepted_tokens > 5


def test_guesses_fit_into_memory():
    """The engine says what it has chosen, or that nothing fits."""
    cache, draft = DENSE, hydra(DENSE)
    whole = engine(cache=cache, draft=draft, draft_memory=10**9).draft_memory
    assert (whole.rows, whole.guesses, whole.tokens, whole.state) == (3, 3, 4, 0)
    less = engine(cache=cache, draft=draft, draft_memory=whole.total - 1)
    assert less.draft_memory.guesses == less._batch.grown.trees.nodes == 2
    assert less.draft_memory.total < whole.total
    with pytest.raises(ValueError, match="is too little for guesses: 1 guess for each of 3 rows"):
        engine(cache=cache, draft=sj.NGrams(), draft_memory=100)


def test_heads_of_another_model_are_refused():
    other = build(bytes_model().config.replace(vocab_size=300))
    with pytest.raises(ValueError, match="trained for another model"):
        engine(draft=knowing_heads(other, CACHE, [1, 2, 3, 4, 5]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hydra", "prompts"])
def test_other_layers_and_models_without_trees(monkeypatch, kind):
    never_rests(monkeypatch)
    delta = BlockConfig(GatedDeltaConfig(num_heads=4, num_groups=2, key_dim=6, value_dim=5), DenseConfig(24))
    window = BlockConfig(AttentionConfig(4, 2, 6, window=7), DenseConfig(24))
    model = jax.tree.map(lambda x: 0.3 * x, build(ModelConfig(259, 16, (delta, window), bos_token_id=256)))
    wanted = [request("ababab" * 3, 20), request("some words", 12, SAMPLED)]
    options = {"rows": 2, "chunk_size": 8, "prefix_bytes": 0}
    plain_one = sj.Engine(model, engines.Endless(), CACHE, **options)
    expected = [tokens(events) for events in served(plain_one, *wanted)]
    texts = [[*one.prompt, *said] for one, said in zip(wanted, expected, strict=True)]
    draft = knowing_heads(model, CACHE, *texts) if kind == "hydra" else prompts_of(16, 208, model=model)
    one = sj.Engine(model, engines.Endless(), CACHE, draft=draft, **options)
    assert [tokens(events) for events in served(one, *wanted)] == expected
    if kind == "hydra":
        assert one.stats().accepted_tokens > 5
