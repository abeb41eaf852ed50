"""Conversations: nothing is read twice, a restart changes no bit, and one that fails is as it was before."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.serving.requests import Sampling, Usage
from tests.serving.engines import bytes_model, engine, finish, request, served, text, tokens
from tests.streaming.tiny_sessions import start

SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=5)


def turn(prompt: str, count: int = 5, **options):
    return request(list(prompt.encode()), count, conversation=options.pop("name", "ann"), **options)


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_conversation_is_the_stream_of_a_session():
    one, session = engine(), start(bytes_model(), sampler=sj.Sampler(temperature=0))
    for prompt in ("how are you", "and then", " good"):
        (events,) = served(one, turn(prompt))
        before = session.tokens_seen
        session.read(list(prompt.encode()))
        assert text(events) == "".join(session.generate(max_new_tokens=5))
        assert events[-1].usage == Usage(before + len(prompt), before, 5)
    (kept,) = one.conversations()
    assert (kept.name, kept.tokens_seen, kept.busy) == ("ann", session.tokens_seen, False)


def test_a_turn_may_come_in_pieces_and_go_on_without_a_prompt():
    whole, pieces = engine(), engine()
    (at_once,) = served(whole, turn("how are you", 6))
    said = served(pieces, turn("how ar", 0))[0]
    assert text(said) == ""
    assert said[-1].finish_reason == "length"
    said += served(pieces, turn("e you", 2))[0]
    said += served(pieces, turn("", 4))[0]
    assert tokens(said) == tokens(at_once)


def test_a_restart_changes_nothing(tmp_path):
    stays, first = engine(), engine(state_dir=tmp_path)
    extra = {"previous": "hello"}
    for one in (stays, first):
        served(one, turn("hello", sampling=SAMPLED, extra=extra), turn("other", name="../bob"))
    first.close()
    second = engine(state_dir=tmp_path)
    assert second.conversations() == stays.conversations()
    assert second.conversations()[0].extra == extra
    for one in (stays, second):
        one.again = served(one, turn("more", 9, sampling=SAMPLED), turn("more", 9, name="../bob"))
    assert list(map(tokens, second.again)) == list(map(tokens, stays.again))
    a, b = (one._conversations._kept["ann"].state for one in (stays, second))
    assert all(x.tobytes() == y.tobytes() for x, y in zip(a.arrays, b.arrays, strict=True))


def test_what_is_on_disk_is_a_session(tmp_path):
    one = engine(state_dir=tmp_path)
    served(one, turn("hello"))
    one.close()
    session = start(bytes_model())
    session.load(tmp_path / "ann")
    again = engine(state_dir=tmp_path)
    (events,) = served(again, turn("more"))
    session.sampler = sj.Sampler(temperature=0)
    assert "".join(session.generate(list(b"more"), max_new_tokens=5)) == text(events)


def test_an_answer_that_has_ended_is_on_disk(tmp_path):
    one = engine(state_dir=tmp_path)
    served(one, turn("hello"))  # its last event has come; the engine is not closed
    assert [kept.tokens_seen for kept in engine(state_dir=tmp_path).conversations()] == [10]


def test_idle_conversations_beyond_the_budget_stay_on_disk_alone(tmp_path):
    one = engine(state_dir=tmp_path, conversation_bytes=1)
    for name in "abc":
        served(one, turn("hello", name=name))
    finish(one)
    one.save("c")
    kept = one._conversations._kept
    assert [kept[name].state is None for name in "ab"] == [True, True]
    plain = engine()
    served(plain, turn("hello", name="a"))
    assert tokens(served(one, turn("more", name="a"))[0]) == tokens(served(plain, turn("more", name="a"))[0])


def test_without_a_disk_a_new_conversation_beyond_the_budget_is_refused():
    one = engine(conversation_bytes=1)
    served(one, turn("hello"))
    served(one, turn("more"))
    with pytest.raises(ValueError, match="state_dir") as caught:
        one.submit(turn("hello", name="bob"))
    assert "\n" not in str(caught.value)


def test_one_request_at_a_time():
    one = engine()
    ticket = one.submit(turn("hello"))
    with pytest.raises(ValueError, match="under way"):
        one.submit(turn("me too"))
    finish(one)
    assert list(ticket.events())[-1].finish_reason == "length"
    assert list(served(one, turn("now me"))[0])[-1].finish_reason == "length"


def test_cancelled_before_its_prompt_was_read_it_is_as_before():
    one = engine()
    served(one, turn("hello"))
    before = one.conversations()
    ticket = one.submit(turn("x" * 100, extra={"new": 1}))
    for _ in range(3):
        one.step()
    ticket.cancel()
    finish(one)
    assert list(ticket.events())[-1].finish_reason == "cancelled"
    assert one.conversations() == before
    fresh = engine()
    served(fresh, turn("hello"))
    assert tokens(served(one, turn("more"))[0]) == tokens(served(fresh, turn("more"))[0])


def test_cancelled_while_it_answers_it_stands_behind_what_was_said():
    one = engine()
    ticket = one.submit(turn("hello", 1000))
    for _ in range(6):
        one.step()
    ticket.cancel()
    finish(one)
    said = list(ticket.events())
    (kept,) = one.conversations()
    assert kept.tokens_seen == 5 + len(tokens(said)) > 5


def test_a_deleted_one_is_gone_and_its_request_is_cancelled(tmp_path):
    one = engine(state_dir=tmp_path)
    served(one, turn("hello"))
    assert (tmp_path / "ann").exists()
    ticket = one.submit(turn("more", 1000))
    one.step()
    assert one.delete_conversation("ann")
    finish(one)
    assert list(ticket.events())[-1].finish_reason == "cancelled"
    one.close()
    assert not (tmp_path / "ann").exists()
    assert not one.conversations()
    assert not one.delete_conversation("ann")


def test_a_damaged_one_ends_its_request_alone(tmp_path):
    one = engine(state_dir=tmp_path)
    served(one, turn("hello"))
    one.close()
    again = engine(state_dir=tmp_path)
    for file in (tmp_path / "ann").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    bad, good = served(again, turn("more"), request("x", 3))
    assert bad[-1].finish_reason == "error"
    assert "\n" not in bad[-1].error
    assert good[-1].finish_reason == "length"
    third = engine(state_dir=tmp_path)
    assert not third.conversations()
    with pytest.raises(ValueError, match="not replaced") as caught:
        third.submit(turn("again"))
    assert "\n" not in str(caught.value)
    assert third.delete_conversation("ann")
    assert served(third, turn("again"))[0][-1].finish_reason == "length"


def test_those_of_another_cache_are_left_alone(tmp_path):
    one = engine(state_dir=tmp_path)
    served(one, turn("hello"))
    one.close()
    other = engine(state_dir=tmp_path, cache=sj.kv.preset("dense", capacity=20))
    with pytest.raises(ValueError, match="saved with the cache"):
        other.submit(turn("more"))
    assert engine(state_dir=tmp_path).conversations() == one.conversations()


def test_a_cache_with_an_end_refuses_what_does_not_fit():
    one = engine(cache=sj.kv.preset("dense", capacity=128))  # whose programs other tests have too
    with pytest.raises(ValueError, match="128 tokens"):
        one.submit(turn("x" * 126, 3))
    served(one, turn("x" * 118, 5))
    with pytest.raises(ValueError, match="123 are used"):
        one.submit(turn("y", 5))
    assert served(one, turn("y", 4))[0][-1].finish_reason == "length"


def test_what_reading_costs_is_measured():
    one = engine(measure=True)
    served(one, turn("hello"))
    session = start(bytes_model())
    nats = session.score(list(b"hello"))
    assert one.costs()["ann"] == (pytest.approx(float(nats.sum()), rel=1e-5), 5)
