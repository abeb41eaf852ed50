"""Text in pieces over a websocket: read while it comes, and the same stream as text that comes at once."""

import json
import time

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streamjax.data.text.chat_turns import turn_around, turn_ids
from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.serving.http.connections import Connection
from tests.serving.http.conftest import PATIENCE, TEMPLATE, fake_service, patient, serving
from tests.serving.http.test_chat import decoded
from tests.serving.http.test_conversations import say
from tests.serving.http.test_robustness import until


def turn(socket, *pieces, **fields):
    """A turn; the answer's text, and what ended it."""
    socket.send(json.dumps({"begin": {"model": "tiny", **fields}}))
    for piece in pieces:
        socket.send(json.dumps({"text": piece}))
    socket.send(json.dumps({"answer": True}))
    text = ""
    while not (message := json.loads(socket.recv(timeout=PATIENCE))).get("done"):
        assert "error" not in message, message
        text += message["choices"][0]["delta"].get("content") or ""
    return text, message


def url(server):
    return server.url.replace("http", "ws") + "/v1/streamjax/input"


def test_it_is_read_while_it_comes_and_is_one_turn(server, engine):
    with patient.socket(url(server)) as socket:
        text, end = turn(socket, "hel", "lo <eo", "s>", conversation="pieces", temperature=0)
        assert (text, end["usage"]["completion_tokens"]) == ("hello", 6)
        reads = engine.requests[:-1]
        assert reads
        assert {request.max_new_tokens for request in reads} == {0}
        whole = [token for request in engine.requests for token in request.prompt]
        assert ByteTokenizer().decode(whole) == "<user>hello <eos>\x1e\n<assistant>"
        assert not set(whole) & {256, 257}
        engine.requests.clear()
        turn(socket, "more", conversation="pieces")
        assert "".join(map(decoded, engine.requests)) == "\x1e\n<user>more\x1e\n<assistant>"
    engine.requests.clear()
    say(server, "pieces", "and over HTTP")
    assert decoded(engine.requests[0]) == "\x1e\n<user>and over HTTP\x1e\n<assistant>"


def test_a_connection_without_a_name_leaves_nothing(server, engine):
    with patient.socket(url(server)) as socket:
        turn(socket, "a")
        turn(socket, "b")
        names = {request.conversation for request in engine.requests}
    assert len(names) == 1
    until(lambda: not names & {kept.name for kept in engine.conversations()})


def test_a_client_that_goes_in_the_middle_leaves_a_whole_turn(server, engine):
    with patient.socket(url(server)) as socket:
        socket.send(json.dumps({"begin": {"model": "tiny", "conversation": "left"}}))
        socket.send(json.dumps({"text": "I was going to"}))
        until(lambda: len(engine.requests) > 0)
    until(lambda: "left" not in server.service.held)
    assert "".join(map(decoded, engine.requests)) == "<user>I was going to\x1e\n<assistant>"
    engine.requests.clear()
    say(server, "left", "hi")
    assert decoded(engine.requests[0]) == "\x1e\n<user>hi\x1e\n<assistant>"


def test_a_client_that_thinks_for_long_stays(monkeypatch):
    monkeypatch.setattr(Connection, "request_seconds", 2.0)
    engine, service = fake_service()
    with serving(engine, service) as running, patient.socket(url(running)) as socket:
        time.sleep(2.5)
        assert turn(socket, "a")[0] == "hello"


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        (["{"], "invalid_json"),
        (['{"text": "no beginning"}'], "missing_required_parameter"),
        (['{"begin": {"model": "other"}}'], "model_not_found"),
        (['{"begin": {"model": "tiny", "n": 2}}'], "invalid_value"),
        (['{"begin": {"model": "tiny"}}', '{"text": 7}'], "invalid_type"),
        (['{"begin": {"model": "tiny"}}', '{"txt": "x"}'], "missing_required_parameter"),
    ],
)
def test_what_is_wrong_is_said(server, engine, messages, code):
    with patient.socket(url(server)) as socket:
        for message in messages:
            socket.send(message)
        assert json.loads(socket.recv(timeout=PATIENCE))["error"]["code"] == code
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=PATIENCE)
    assert patient.get(f"{server.url}/health").status_code == 200


def test_pages_of_other_sites_are_kept_out(server):
    with pytest.raises(InvalidStatus), patient.socket(url(server), origin="http://elsewhere.example"):
        pass


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("begins", [True, False])
def test_what_stands_around_the_pieces_is_what_stands_around_the_whole(template, begins):
    tokenizer = ByteTokenizer(chat_template=template)
    where = {
        "previous": None if begins else [{"role": "user", "content": "[text]"}],
        "stopped_by": 257,
        "begins": begins,
    }
    for text in ("some text", "[text]", "[[text]]"):
        before, behind = turn_around(tokenizer, **where)
        whole = turn_ids(tokenizer, [{"role": "user", "content": text}], **where)
        assert [*before, *tokenizer.encode(text), *behind] == whole
