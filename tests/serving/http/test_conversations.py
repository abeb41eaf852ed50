"""Conversations: a request sends what is new, the server knows the rest."""

import threading

import openai
import pytest

from tests.serving.http.conftest import patient
from tests.serving.http.test_chat import decoded

SYSTEM = {"role": "system", "content": "Be brief."}


def say(server, name, *messages, **options):
    body = [message if isinstance(message, dict) else {"role": "user", "content": message} for message in messages]
    extra = {"conversation": name}
    return server.client().chat.completions.create(model="tiny", messages=body, extra_body=extra, **options)


def test_a_turn_reads_what_it_adds(server, engine):
    answer = say(server, "one", SYSTEM, "first")
    assert answer.conversation == {"id": "one"}
    say(server, {"id": "one"}, "second")
    say(server, "one", SYSTEM, "third", max_tokens=2)  # the same system message again
    say(server, "one", "fourth")
    assert [decoded(request) for request in engine.requests] == [
        "<system>Be brief.\x1e\n<user>first\x1e\n<assistant>",
        "\x1e\n<user>second\x1e\n<assistant>",
        "\x1e\n<user>third\x1e\n<assistant>",
        "\x1e\n<user>fourth\x1e\n<assistant>",
    ]
    assert {request.conversation for request in engine.requests} == {"one"}
    with pytest.raises(openai.BadRequestError, match="cannot be changed"):
        say(server, "one", {"role": "system", "content": "Be long."}, "fifth")
    with pytest.raises(openai.BadRequestError, match="nothing new"):
        say(server, "one", SYSTEM)


def test_results_of_tools_go_on_behind_the_call(server, engine):
    say(server, "tools", "what?")
    say(server, "tools", {"role": "tool", "tool_call_id": "c", "content": "42"})
    say(server, "tools", "thanks")
    assert "what?" not in decoded(engine.requests[1])
    assert "<tool_response>\n42\n</tool_response>" in decoded(engine.requests[1])
    assert decoded(engine.requests[2]) == "\x1e\n<user>thanks\x1e\n<assistant>"
    assert [message["role"] for message in engine.kept["tools"].extra["previous"]] == ["user"]


def test_they_are_listed_created_and_deleted(server, engine):
    url = f"{server.url}/v1/conversations"
    made = patient.post(url).json()
    assert made["id"].startswith("conv_")
    assert patient.post(url, json={"id": "mine"}).json()["tokens_seen"] == 0
    assert patient.post(url, json={"id": "mine"}).status_code == 409
    assert patient.post(url, json={"id": "../mine"}).status_code == 400
    say(server, "mine", "hello")
    listed = {each["id"]: each["tokens_seen"] for each in patient.get(url).json()["data"]}
    assert listed["mine"] > 0
    assert listed[made["id"]] == 0
    assert patient.get(f"{url}/mine").json()["tokens_seen"] == listed["mine"]
    assert patient.delete(f"{url}/mine").json() == {"id": "mine", "object": "conversation.deleted", "deleted": True}
    assert patient.delete(f"{url}/{made['id']}").status_code == 200
    for answer in (patient.get(f"{url}/mine"), patient.delete(f"{url}/mine")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "conversation_not_found")


def test_one_request_at_a_time(server, engine):
    engine.held.clear()
    first = threading.Thread(target=say, args=(server, "busy", "a"))
    first.start()
    while not engine.requests:
        pass
    with pytest.raises(openai.ConflictError, match="busy"):
        say(server, "busy", "b")
    engine.held.set()
    first.join()
    say(server, "busy", "c")
    assert len(engine.requests) == 2
    with pytest.raises(openai.NotFoundError):  # nothing is held by what failed before the engine had it
        server.client().chat.completions.create(
            model="other", messages=[{"role": "user", "content": "x"}], extra_body={"conversation": "busy"}
        )
    say(server, "busy", "d")
