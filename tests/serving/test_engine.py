"""Requests through the engine: each gets what it would get alone, whatever runs beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.serving import batch
from streamjax.serving.engine import Engine
from streamjax.serving.requests import Overloaded, Request, Sampling
from streamjax.serving.row_states import batch_axes
from tests.serving.engines import GREEDY, alone, bytes_model, engine, finish, request, served, text, tokens
from tests.streaming.tiny_sessions import CACHE, Endless

SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.2, seed=7)
MIXED = [
    request("a", 9),
    request("Once upon a time, there was one", 5),
    request("some words here", 12, SAMPLED),
    request("xyz" * 9, 7, dataclasses.replace(SAMPLED, seed=3)),
    request("Once upon a time, there was nobody", 6),
]


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_tokens_are_those_of_a_stream_alone(policy):
    for wanted, events in zip(MIXED, served(engine(policy=policy), *MIXED), strict=True):
        assert tokens(events) == alone(wanted)
        assert events[-1].finish_reason == "length"
        assert events[-1].usage.completion_tokens == wanted.max_new_tokens


@settings(max_examples=settings.default.max_examples // 2)
@given(
    st.permutations(range(len(MIXED))),
    st.lists(st.integers(0, 9), min_size=len(MIXED), max_size=len(MIXED)),
    st.sampled_from(["fcfs", "mlfq"]),
    st.sampled_from([0, 1 << 20]),
)
def test_a_request_does_not_depend_on_its_neighbours(order, pauses, policy, prefix_bytes):
    one = engine(policy=policy, prefix_bytes=prefix_bytes)
    tickets = {}
    for i, pause in zip(order, pauses, strict=True):
        tickets[i] = one.submit(MIXED[i])
        for _ in range(pause):
            one.step()
    finish(one)
    for i, ticket in tickets.items():
        assert tokens(list(ticket.events())) == alone(MIXED[i])


@pytest.mark.parametrize(("step_seconds", "beside"), [(1e-9, 16), (1e9, 64)])
def test_chunks_beside_rows_that_decode_are_as_small_as_the_time_asks(monkeypatch, step_seconds, beside):
    one, read = engine(chunk_size=64, step_seconds=step_seconds, prefix_bytes=1 << 20), []
    take = one._batch.read
    monkeypatch.setattr(one._batch, "read", lambda *given: (read.append(len(given[1])), take(*given))[1])
    first, long = request("a", 30), request("Once upon a time, there was nobody. " * 5, 4)
    served(one, long)
    assert read == [64, 64, 53]  # nobody decodes
    tickets = [one.submit(first)]
    for _ in range(4):
        one.step()
    read.clear()
    other = request("Some words that nobody has said so far. " * 5, 4)
    tickets.append(one.submit(other))
    finish(one)
    assert max(read[2:]) == beside  # at first nothing is known
    assert sum(read) == len(other.prompt)
    for wanted, ticket in zip((first, other), tickets, strict=True):
        assert tokens(list(ticket.events())) == alone(wanted)


@pytest.mark.parametrize("step_seconds", [None, 1e-9])
def test_what_is_said_to_be_shared_is_read_twice_and_then_known(monkeypatch, step_seconds):
    """Its end is no multiple of the chunk. Whoever goes on from there gets the tokens of a lone request."""
    one, read = engine(prefix_bytes=1 << 20, step_seconds=step_seconds), []
    take = one._batch.read
    monkeypatch.setattr(one._batch, "read", lambda *given: (read.append(len(given[1])), take(*given))[1])
    begins = [256, *b"You are a bee."]  # 15
    every = [
        request([*begins, *ends.encode()], shared=15) for ends in ("Hi. Who?", "Now, tell me more.", "No", "Hi. Who?")
    ]
    cached = []
    for wanted in every:
        read.clear()
        (events,) = served(one, wanted)
        cached.append(events[-1].usage.cached_tokens)
        assert sum(read) == len(wanted.prompt) - cached[-1]
        assert sum(read[:2]) == 15 or cached[-1]  # 8 and 7: a cut behind it
        (lone,) = served(engine(), wanted)
        assert tokens(events) == tokens(lone)
        assert events[-1].usage.prompt_tokens == len(wanted.prompt)
    assert cached == [0, 0, 15, 23]  # a state is kept where two prompts were seen to part
    with pytest.raises(ValueError, match="shared must not be negative, got -1"):
        one.submit(request("a", shared=-1))


def test_where_few_rows_decode_few_are_computed(monkeypatch):
    """The first 1 or 4 of six, or all; a stream that is alone again in a later row is computed with those before it."""
    widths, run = [], batch.decode_rows
    monkeypatch.setattr(batch, "decode_rows", lambda *given: (widths.append(given[-1]), run(*given))[1])
    one = engine(rows=6, narrow=True)
    assert served(one, MIXED[0])
    assert set(widths) == {1}
    widths.clear()
    several = [request(f"number {i} of them", 30 + 4 * (i == 5)) for i in range(6)]
    for wanted, events in zip(several, served(one, *several), strict=True):
        assert tokens(events) == alone(wanted)
    assert set(widths) == {1, 4, 6}
    assert widths[-1] == 6
    for exact in (engine(rows=6), engine(rows=6, narrow=True, cache=sj.kv.preset("dense", capacity=64))):
        assert exact._batch.widths == (6,)


@pytest.mark.parametrize("width", [1, 4])
def test_rows_behind_those_that_are_computed_keep_every_bit(width):
    one = engine(rows=6, narrow=True)
    tickets = [one.submit(request(f"number {i} of them", 20)) for i in range(6)]
    while one.stats().running < 6:
        one.step()

    def arrays():
        held = one._batch.state
        axes = jax.tree.leaves(batch_axes(held))
        return [np.moveaxis(np.array(x), axis, 0) for x, axis in zip(jax.tree.leaves(held), axes, strict=True)]

    before, remaining = arrays(), np.array(one._batch.sampling.remaining)
    drawn = jax.device_get(one._batch.decode(np.arange(6) < width, 1))
    after, left = arrays(), np.array(one._batch.sampling.remaining)
    assert (drawn.token[:width] >= 0).all()
    assert (drawn.token[width:] == -1).all()
    for row in range(6):
        same = all(np.array_equal(old[row], new[row]) for old, new in zip(before, after, strict=True))
        assert same == (row >= width)
        assert (remaining[row] == left[row]) == (row >= width)
    assert len(tickets) == 6


def test_nothing_is_compiled_while_it_serves():
    one = engine(prefix_bytes=1 << 20, policy="mlfq")
    one.warm_up()
    served(one, MIXED[0])
    compiled = []

    def note(name: str, *_: object, **__: object) -> None:
        compiled.extend([name] if "backend_compile" in name else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        served(one, *MIXED, request("bias", 4, Sampling(logit_bias=((3, 1.0),), seed=2**40), logprobs=2))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


def test_a_long_prompt_does_not_hold_up_the_rows():
    one = engine()
    short, long = one.submit(request("a", 40)), one.submit(request("b" * 100, 4))
    one.step()
    for _ in range(12):
        before = one.stats().generated_tokens
        one.step()
        assert one.stats().generated_tokens == before + 1  # a token of the short one beside each chunk of the long
    finish(one)
    assert len(tokens(list(short.events()))) == 40
    assert len(tokens(list(long.events()))) == 4


def test_the_urgent_preempts_and_nothing_is_lost():
    one = engine(policy="mlfq", rows=1)
    long = one.submit(request("a", 60))
    for _ in range(30):
        one.step()
    short = one.submit(request("b", 3))
    finish(one)
    assert tokens(list(long.events())) == alone(request("a", 60))
    assert tokens(list(short.events())) == alone(request("b", 3))


def test_a_block_of_tokens_is_the_same_tokens():
    wanted = request("a", 9)
    assert tokens(served(engine(block=4), wanted)[0]) == alone(wanted)


def test_stop_ids_end_a_text_and_are_not_shown():
    all_tokens = alone(request("a", 9))
    stop = all_tokens[4]
    first = all_tokens.index(stop)
    (events,) = served(engine(block=4), request("a", 9, stop_ids=(stop,)))
    assert tokens(events) == all_tokens[:first]
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage.completion_tokens == first + 1


def test_stop_strings_end_a_text_and_are_not_in_it():
    (plain,) = served(engine(), request("tell me", 30))
    word = text(plain)[5:7]
    (events,) = served(engine(), request("tell me", 30, stop=(word,)))
    assert text(events) == text(plain)[: text(plain).index(word)]
    assert events[-1].finish_reason == "stop"


def test_logprobs_are_of_the_model_itself():
    wanted = request("some text", 5, dataclasses.replace(SAMPLED, temperature=2.0), logprobs=3)
    (events,) = served(engine(), wanted)
    found = [one for event in events for one in event.logprobs]
    assert [one.token for one in found] == tokens(events) == alone(wanted)
    from streamjax import forward

    logits = forward(bytes_model(), jnp.asarray([[*wanted.prompt, *tokens(events)]]))[0, len(wanted.prompt) - 1 : -1]
    want = np.asarray(jax.nn.log_softmax(logits))
    for one, row in zip(found, want, strict=True):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-4)
        assert [token for token, _ in one.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


def test_penalties_and_bias_change_what_is_drawn():
    def drawn(**sampling) -> list[int]:
        return tokens(served(engine(), request("aaaa", 24, Sampling(temperature=0, **sampling)))[0])

    plain = drawn()
    assert plain == drawn(presence_penalty=0.0)
    assert len(set(drawn(presence_penalty=2.0))) > len(set(plain))
    assert len(set(drawn(frequency_penalty=2.0))) > len(set(plain))
    assert drawn(logit_bias=((65, 100.0),)) == [65] * 24
    assert plain[0] not in drawn(logit_bias=((plain[0], -100.0),))[:1]


class Alternating:
    """Only two tokens, in turn."""

    def __init__(self, *forms: int):
        self.forms, self.at = forms, 0

    def allowed(self) -> np.ndarray:
        mask = np.zeros(259, bool)
        if self.at < len(self.forms):
            mask[self.forms[self.at]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.forms[self.at]
        self.at += 1


def test_a_form_is_kept_and_a_neighbour_knows_nothing_of_it():
    formed, free = served(
        engine(), request("x", 4, SAMPLED, constraint=Alternating(72, 73, 74, 75)), request("Once", 12)
    )
    assert text(formed) == "HIJK"
    assert tokens(free) == alone(request("Once", 12))


def test_a_form_that_cannot_go_on_ends_its_request_alone():
    formed, free = served(engine(), request("x", 9, constraint=Alternating(72, 73)), request("Once", 12))
    assert text(formed) == "HI"
    assert formed[-1].finish_reason == "error"
    assert "\n" not in formed[-1].error
    assert tokens(free) == alone(request("Once", 12))


def test_a_cancelled_request_frees_its_row_within_a_step():
    one = engine(rows=1)
    gone, next_one = one.submit(request("a", 1000)), one.submit(request("b", 3))
    for _ in range(4):
        one.step()
    gone.cancel()
    one.step()
    assert one.stats().running <= 1
    finish(one)
    assert list(gone.events())[-1].finish_reason == "cancelled"
    assert tokens(list(next_one.events())) == alone(request("b", 3))
    gone.cancel()
    assert one.stats().finished == {"cancelled": 1, "length": 1}


def test_values_that_are_not_finite_end_their_request_alone():
    model = bytes_model()
    broken = jax.tree.map(lambda x: x, model)
    broken.embedding[...] = model.embedding[...].at[7].set(jnp.nan)
    one = Engine(broken, Endless(), CACHE, rows=3, chunk_size=8, prefix_bytes=0)
    wanted = request("Once", 12)
    bias = dataclasses.replace(GREEDY, logit_bias=((7, -1e9),))
    bad, good = served(one, request([256, 7], 12), dataclasses.replace(wanted, sampling=bias))
    assert bad[-1].finish_reason == "error"
    assert "not finite" in bad[-1].error
    assert good[-1].finish_reason == "length"


def test_a_full_queue_refuses_and_says_when_to_come_again():
    one = engine(queue=2)
    tickets = [one.submit(request("a", 2)) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        one.submit(request("a", 2))
    assert caught.value.retry_after >= 1
    finish(one)
    assert all(list(ticket.events()) for ticket in tickets)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Request((), 3), "prompt is empty"),
        (Request((1, 259), 3), "259"),
        (Request((1,), -1), "max_new_tokens"),
        (Request((1,), 3, stop_ids=(-1,)), "stop_ids"),
        (Request((1,), 3, stop=("",)), "stop"),
        (Request((1,), 3, logprobs=21), "logprobs"),
        (Request((1,), 3, adapter="no"), "adapter"),
        (Request((1,), 3, Sampling(logit_bias=((999, 1.0),))), "logit_bias"),
        (Request((), 3, conversation="new"), "has not begun"),
        (Request((1,), 3, conversation=""), "name"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(wrong, says):
    with pytest.raises(ValueError, match=says) as caught:
        engine().submit(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows"),
        ({"policy": "lifo"}, "policy"),
        ({"memory_bytes": 1000}, "rows would fit"),
        ({"prefix_bytes": -1}, "prefix_bytes"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_in_one_line(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        engine(**options)
    assert "\n" not in str(caught.value)


def test_a_thread_of_its_own_serves_many_clients():
    one = engine(prefix_bytes=1 << 20)
    one.start()
    heard = []
    tickets = [one.submit(wanted) for wanted in MIXED]
    one.submit(MIXED[0], heard.append)
    for ticket, wanted in zip(tickets, MIXED, strict=True):
        assert tokens(list(ticket.events())) == alone(wanted)
    left = one.submit(request("for ever", 10**6))
    one.close()
    assert list(left.events())[-1].finish_reason == "cancelled"
    assert tokens(heard) == alone(MIXED[0])
    with pytest.raises(ValueError, match="closed"):
        one.submit(MIXED[0])


@pytest.mark.parametrize(
    ("chunk_size", "widths"),
    [(8, (8,)), (16, (16,)), (64, (16, 24, 32, 48, 64)), (100, (16, 24, 32, 48, 64, 96, 100))],
)
def test_prompts_are_read_in_few_widths_with_little_padding(chunk_size, widths):
    one = engine(chunk_size=chunk_size)._batch
    assert one.chunk_widths == widths
    for count in range(1, chunk_size + 1):
        assert one.width(count) == min(width for width in widths if width >= count)
        assert one.width(count) <= max(1.5 * count, widths[0])
