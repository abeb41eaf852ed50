"""Answers over a websocket while the text still comes: what comes when, over a real socket, from a real tiny model."""

import json

import pytest
from websockets.exceptions import ConnectionClosed

import streamjax as sj
from streamjax.serving.http.service import Service
from streamjax.serving.simultaneous.streams import SimultaneousStreams
from streamjax.streaming.simultaneous import generate_while_reading, init_groups
from streamjax.streaming.text_output import TextOutput
from tests.serving.engines import bytes_model
from tests.serving.http.conftest import PATIENCE, TEMPLATE, patient, serving, until
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.test_text_input import turn, url
from tests.streaming.tiny_sessions import Endless

CACHE = sj.kv.preset("dense", capacity=48)
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 6, "wait": 3, "logprobs": True}


@pytest.fixture(scope="module")
def server():
    tokenizer = Endless(chat_template=TEMPLATE)
    streams = SimultaneousStreams(bytes_model(), tokenizer, CACHE, 1, chunk_size=8)
    engine = FakeEngine(tokenizer)
    with serving(engine, Service(engine, "tiny", tokenizer, 259, (257,), simultaneous=streams)) as running:
        yield running


def tell(socket, **message):
    socket.send(json.dumps(message))


def hear(socket):
    return json.loads(socket.recv(timeout=PATIENCE))


def words(socket, count=None):
    """Text until the turn is over, and what it took; or the text of so many tokens."""
    text = ""
    while count is None or count > 0:
        message = hear(socket)
        assert "error" not in message, message
        if message.get("done"):
            return text, message["usage"]
        choice = message["choices"][0]
        text += choice["delta"].get("content") or ""
        count = None if count is None else count - (choice["logprobs"] is not None)
    return text


def expected(source, wait=3, between=1, template=True):
    """What the library's function writes of the same ids."""
    first, begin = ([*b"<user>"], [*b"\x1e\n<assistant>"]) if template else ([256], [256])
    tokens = generate_while_reading(
        bytes_model(), init_groups(bytes_model(), CACHE), [[*first, *source.encode()]], wait=len(first) + wait,
        between=between, begin=begin, max_new_tokens=6, sampler=sj.Sampler(temperature=0), chunk_size=8,
    )  # fmt: skip
    output = TextOutput(Endless())
    output.push([token for _, token in tokens])
    output.finish()
    return output.take()


def test_words_come_before_the_text_has_ended(server):
    with patient.socket(url(server)) as socket:
        tell(socket, begin=GREEDY)
        tell(socket, text="some")
        first = words(socket, 1)  # of three tokens: nobody has said that the text is over
        tell(socket, text=" words")
        tell(socket, answer=True)
        rest, usage = words(socket)
        assert first + rest == expected("some words")
        assert usage["completion_tokens"] == 6
        assert turn(socket, "a", temperature=0)[0] == "hello"  # and as before, from the engine


@pytest.mark.slow
def test_waits_and_a_beginning_of_its_own(server):
    with patient.socket(url(server)) as socket:
        text, _ = turn(socket, "some", " words", **{**GREEDY, "wait": 5, "between": 2, "template": False})
        assert text == expected("some words", 5, 2, template=False)


def test_a_text_that_goes_on_behind_the_answer_is_dropped(server):
    with patient.socket(url(server)) as socket:
        tell(socket, begin=GREEDY)
        tell(socket, text="some words and")
        text, _ = words(socket)
        tell(socket, text=" more of them")
        tell(socket, answer=True)
        assert text == expected("some words and")
        assert turn(socket, "some words", **GREEDY)[0] == expected("some words")


def test_a_place_is_free_when_its_client_goes(server):
    streams = server.service.simultaneous
    with patient.socket(url(server)) as socket:
        tell(socket, begin=GREEDY)
        tell(socket, text="some")
        words(socket, 1)
        with patient.socket(url(server)) as second:
            tell(second, begin=GREEDY)
            assert hear(second)["error"]["code"] == "overloaded"
    until(lambda: streams._open == 0)
    with patient.socket(url(server)) as socket:
        assert turn(socket, "some words", **GREEDY)[0] == expected("some words")


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"begin": {**GREEDY, "wait": -1}}], "invalid_value"),
        ([{"begin": {**GREEDY, "wait": "3"}}], "invalid_type"),
        ([{"begin": {**GREEDY, "conversation": "ann"}}], "invalid_value"),
        ([{"begin": {**GREEDY, "max_tokens": 90}}], "invalid_value"),
        ([{"begin": GREEDY}, {"text": 7}], "invalid_type"),
        ([{"begin": GREEDY}, {"text": "x" * 60}], "invalid_value"),
    ],
)
def test_what_is_wrong_is_said(server, messages, code):
    with patient.socket(url(server)) as socket:
        for message in messages:
            tell(socket, **message)
        found = hear(socket)
        while "error" not in found:
            found = hear(socket)
        assert found["error"]["code"] == code
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=PATIENCE)
    until(lambda: server.service.simultaneous._open == 0)


def test_a_server_without_such_streams_says_so():
    tokenizer = Endless(chat_template=TEMPLATE)
    engine = FakeEngine(tokenizer)
    service = Service(engine, "tiny", tokenizer, 259, (257,))
    with serving(engine, service) as running, patient.socket(url(running)) as socket:
        tell(socket, begin=GREEDY)
        assert "--simultaneous" in hear(socket)["error"]["message"]
